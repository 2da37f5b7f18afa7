"""A bank's index as named tensors, and back: what a file holds of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..files.store import file_of
from ..ops.checks import check_finite_rows
from ..ops.cpu_bank import ClusterArrays, link_clusters
from ..ops.cpu_codes import CodedRows, LeadingAxes, encode_rows
from .centroids import can_be_clustered
from .cpu_choice import can_be_coded
from .index import Index

STORAGES = (torch.float32, torch.float16)
_COSINE = 1
_DERIVED = ("centroid_tiles", "gaps")  # fields of ClusterArrays that are not saved


def state_of(index: Index) -> dict[str, Tensor]:
    """The tensors of an index on the CPU that has no appended rows."""
    assert index.appended is None
    index.check_file()
    wanted = -1 if index.wanted_clusters is None else index.wanted_clusters
    state = {
        "groups": index.groups,
        "grid": _int64(*index.grid),
        "settings": _int64(wanted, index.seed),
        "clustered_rows": _int64(index.tried_rows),
    }
    if index.metric == "cosine":
        state |= {"metric": _int64(_COSINE)}
    if index.patches is not None:
        radius = torch.tensor([index.radius], dtype=torch.float64, device="cpu")
        state |= {"patches": index.patches, "radius": radius}
    if index.codes is not None:
        state |= _leading_state(index.codes)
    if index.clusters is None:
        return state | {"data": index.data}
    assert isinstance(index.clusters, ClusterArrays)
    arrays = index.clusters._asdict()
    kept = {name: values for name, values in arrays.items() if name not in _DERIVED}
    return (
        state | kept | {"stretch": torch.tensor([index.stretch], dtype=torch.float64, device="cpu")}
    )


def index_of(state: Mapping[str, Tensor], keeps_codes: bool = True) -> Index:
    """The index over the memory of these tensors; codes are made anew, along axes that were saved.

    Raises ValueError if tensors are missing, do not fit together, or hold NaN or infinity.
    """
    try:
        for name, tensor in state.items():
            if tensor.data_ptr() % tensor.element_size():
                raise ValueError(f"a bank's {name} must be aligned in memory")
        rows, columns = _integers(state, "grid", 2)
        wanted, seed = _integers(state, "settings", 2)
        data, groups = state["data"], state["groups"]
        if data.ndim != 2 or data.numel() == 0 or data.dtype not in STORAGES:
            raise ValueError(
                "a bank's data must have shape [M, D], float32 or float16, "
                f"got {list(data.shape)}, {data.dtype}"
            )
        if min(rows, columns) < 1 or groups.ndim != 1 or groups.dtype != torch.int64:
            raise ValueError(
                "a bank's groups must be int64 [N] and its grid at least 1 x 1, "
                f"got {groups.dtype} {list(groups.shape)} and {rows} x {columns}"
            )
        patches, radius = _patches(state, len(data), len(groups) * rows * columns)
        if patches is None and len(groups) * rows * columns != len(data):
            raise ValueError(f"a bank of {len(groups)} groups cannot have {len(data)} rows")
        check_finite_rows("data", data)
        # Files of earlier versions do not say when clusters were tried without success.
        tried = _integers(state, "clustered_rows", 1)[0] if "clustered_rows" in state else len(data)
        clusters, stretch = _clusters(state)
        index = Index(
            data=data,
            appended=None,
            groups=groups,
            grid=(rows, columns),
            patches=patches,
            clusters=clusters,
            codes=None,
            stretch=stretch,
            wanted_clusters=None if wanted < 0 else wanted,
            seed=seed,
            tried_rows=tried,
            keeps_codes=keeps_codes,
            radius=radius,
            metric=_metric(state),
            file=file_of(state),
        )
        if keeps_codes and "leading_axes" in state:
            return index._replace(codes=encode_rows(data, _leading_axes(state)))
        return index.coded()
    except KeyError as error:
        raise ValueError(f"these tensors are not a bank: {error} is missing") from error


def _clusters(state: Mapping[str, Tensor]) -> tuple[ClusterArrays | None, float]:
    """The clusters in a state, and the stretch of their projection."""
    if "ids" not in state:
        return None, 1.0
    own = {name: state["data"].new_empty(0, dtype=torch.float32) for name in _DERIVED}
    # Where rows begin is kept in memory of its own: a mapped file that somebody writes into during
    # a search must not make it read elsewhere.
    own |= {name: state[name].clone() for name in ("starts", "blocks")}
    arrays = ClusterArrays(
        **{name: own[name] if name in own else state[name] for name in ClusterArrays._fields}
    )
    arrays.check()
    if state["stretch"].shape != (1,) or not 1 <= float(state["stretch"]) < 2:
        raise ValueError(f"a bank's stretch must be about 1, got {state['stretch']}")
    return link_clusters(arrays), float(state["stretch"])


def _leading_state(codes: CodedRows) -> dict[str, Tensor]:
    """Which axes lead, for codes to be made again without a trial; none where none do."""
    if codes.leading_axes is None:
        none = codes.codes.centres.new_zeros(codes.data.shape[1], 1)
        return {"leading_axes": none[:, :0].contiguous(), "leading_mean": none.flatten()}
    mean, basis = codes.leading_axes
    return {"leading_axes": basis[:, :-1].contiguous(), "leading_mean": mean}


def _leading_axes(state: Mapping[str, Tensor]) -> LeadingAxes | None:
    """The inverse of `_leading_state`."""
    axes, mean, data = state["leading_axes"], state["leading_mean"], state["data"]
    if not can_be_coded(data) or "ids" in state:
        raise ValueError("a bank that has leading_axes must be one that has codes")
    if axes.shape == (data.shape[1], 0):
        return None
    if axes.dtype != torch.float32 or mean.dtype != torch.float32:
        raise ValueError(
            f"a bank's leading_axes must be float32, got {axes.dtype}, its mean {mean.dtype}"
        )
    if axes.ndim != 2 or len(axes) != data.shape[1] or mean.shape != data.shape[1:]:
        raise ValueError(
            f"a bank's leading_axes must have shape [{data.shape[1]}, A], got {list(axes.shape)}, "
            f"their mean {list(mean.shape)}"
        )
    if not (can_be_clustered(data) and can_be_clustered(mean[None])):  # false for NaN, too
        raise ValueError("a bank's leading_mean, and data that has such, must be moderate values")
    return LeadingAxes.along(mean, axes)


def _metric(state: Mapping[str, Tensor]) -> str:
    """The metric of a state, which says so only if it is not the Euclidean one."""
    if "metric" not in state:
        return "euclidean"
    (number,) = _integers(state, "metric", 1)
    if number != _COSINE:
        raise ValueError(f"a bank's metric must be {_COSINE} (cosine), got {number}")
    if state["data"].dtype != torch.float32:
        raise ValueError(f"a cosine bank's data must be float32, got {state['data'].dtype}")
    return "cosine"


def _patches(state: Mapping[str, Tensor], rows: int, count: int) -> tuple[Tensor | None, float]:
    """Which of `count` patches the rows of a coreset are, and its covering radius."""
    if "patches" not in state:
        return None, 0.0
    patches, radius = state["patches"], state["radius"]
    if patches.dtype != torch.int64 or patches.shape != (rows,):
        raise ValueError(
            f"a bank's patches must be int64 [{rows}], got {patches.dtype} {list(patches.shape)}"
        )
    # The range first: differences of any int64 values might wrap around.
    inside = int(patches.min()) >= 0 and int(patches.max()) < count
    if not inside or not bool((patches.diff() > 0).all()):
        raise ValueError(f"a bank's patches must ascend from at least 0 to less than {count}")
    if radius.shape != (1,) or not 0 <= float(radius) < torch.inf:
        raise ValueError(f"a bank's radius must be at least 0, got {radius}")
    return patches, float(radius)


def _integers(state: Mapping[str, Tensor], name: str, count: int) -> list[int]:
    """The values of the tensor [count] int64 of that name in a state."""
    values = state[name]
    if values.dtype != torch.int64 or values.shape != (count,):
        raise ValueError(
            f"a bank's {name} must be int64 [{count}], got {values.dtype} {list(values.shape)}"
        )
    return [int(value) for value in values]


def _int64(*values: int) -> Tensor:
    """On the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")
