"""The native operations as torch ops: schemas, fakes for tracing, autograd, choice of backend.

Every op validates, allocates its results with torch, and hands raw pointers to the extension. The
backend follows the device of the input: CPU kernels on `torch.get_num_threads()` threads, CUDA
kernels on the current stream. The public functions are at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import _native
from .cluster_arrays import ClusterArrays
from .levels import PatchLevel
from .sampling import COLOUR_SHIFT, MAX_REDRAWS, PIXEL_NOISE, PairKind
from .segment_arrays import SegmentArrays
from .validation import (
    FloatArray,
    IntArray,
    as_tensor,
    check_dtype,
    check_finite_rows,
    check_groups,
    check_indices,
    check_pairs,
    check_same_device,
    check_search_operands,
    check_shape,
    like_input,
)

_PIXEL_TYPES = {
    torch.uint8: _native.PixelType.UINT8,
    torch.float16: _native.PixelType.FLOAT16,
    torch.float32: _native.PixelType.FLOAT32,
}
_COPY_DTYPES = (*_PIXEL_TYPES, torch.bfloat16, torch.float64)

_library = torch.library.Library("patchsvdd_fast", "DEF")
_library.define("extract_patches(Tensor images, int size, int stride, Tensor? mean=None) -> Tensor")
_library.define(
    "extract_patches_backward(Tensor patch_gradients, int stride, int height, int width) -> Tensor"
)
_library.define(
    "score_map(Tensor distances, int size, int stride, int height, int width) -> Tensor"
)
_GROUPS = "Tensor? query_groups=None, Tensor? bank_groups=None, int rows_per_group=1"
_library.define(f"nearest(Tensor queries, Tensor bank, {_GROUPS}) -> (Tensor, Tensor)")
_library.define(
    f"nearest_in_segments(Tensor queries, Tensor[] bank, {_GROUPS}) -> (Tensor, Tensor)"
)
_library.define(
    f"nearest_in_clusters(Tensor queries, Tensor[] bank, float stretch, {_GROUPS})"
    " -> (Tensor, Tensor)"
)
_library.define(
    "crop_pairs(Tensor images, Tensor mean, Tensor image_of, int size, str kind, int seed, "
    "int step, bool redraw_clipped=False) -> (Tensor, Tensor, Tensor)"
)


# --- backends -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _backend(tensor: Tensor) -> Iterator[tuple[type[_native.Backend], int]]:
    """The kernels for the tensor's device, and the context (threads or stream) they run in."""
    if tensor.device.type == "cpu":
        yield _native.cpu, torch.get_num_threads()
        return
    if _native.cuda is None:
        raise RuntimeError(
            "got a CUDA tensor, but this build of patchsvdd_fast has no CUDA kernels: install the "
            "CUDA toolkit and reinstall with PATCHSVDD_CUDA=ON"
        )
    with torch.cuda.device(tensor.device):
        yield _native.cuda, torch.cuda.current_stream().cuda_stream


def instruction_sets() -> list[str]:
    """Instruction sets the CPU search can use on this machine, best first."""
    return _native.cpu.instruction_sets()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Within the context, search with the named instruction set (for tests and benchmarks)."""
    before = _native.cpu.instruction_set()
    _native.cpu.set_instruction_set(name)
    try:
        yield
    finally:
        _native.cpu.set_instruction_set(before)


_METHODS = ("auto", "plain", "screened")
_method = ContextVar("method", default="auto")


@contextlib.contextmanager
def use_method(name: str) -> Iterator[None]:
    """Within the context, search brute force in the named way (for tests and benchmarks).

    "plain" computes every distance canonically, "screened" none that low precision rules out,
    "auto" chooses by size. The answer is the same.
    """
    if name not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {name}")
    token = _method.set(name)
    try:
        yield
    finally:
        _method.reset(token)


_workspace_limit = ContextVar("workspace_limit", default=1 << 30)


@contextlib.contextmanager
def use_workspace_limit(num_bytes: int) -> Iterator[None]:
    """Within the context, a search on a GPU keeps its scratch memory near `num_bytes`.

    The default is 1 GiB; less means more and smaller chunks, and the same answer. A search needs
    at least one chunk, 1 MiB or so.
    """
    if num_bytes < 1:
        raise ValueError(f"the limit must be at least 1 byte, got {num_bytes}")
    token = _workspace_limit.set(num_bytes)
    try:
        yield
    finally:
        _workspace_limit.reset(token)


def _new_workspace(like: Tensor, num_bytes: int) -> Tensor:
    try:
        return like.new_empty(num_bytes, dtype=torch.uint8)
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(
            f"the search asked for {num_bytes / 2**20:,.0f} MiB of scratch memory, more than is "
            f"free on {like.device}: lower it with ops.use_workspace_limit(bytes)"
        ) from error


# --- extract_patches ------------------------------------------------------------------------------


def _grid(images: Tensor, size: int, stride: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return PatchLevel(size, stride).grid_shape(height, width)


def _native_grid(
    images: int, channels: int, pixels: tuple[int, int], cells: tuple[int, int], *patch: int
) -> _native.PatchGrid:
    return _native.PatchGrid(images, channels, *pixels, *cells, *patch)


def _check_extract_patches(images: Tensor, mean: Tensor | None) -> None:
    check_shape("images", images, "N, C, H, W")
    if mean is None:
        check_dtype("images", images, *_COPY_DTYPES)
        return
    check_dtype("images", images, *_PIXEL_TYPES)
    check_dtype("mean", mean, torch.float32)
    check_same_device("mean", mean, "images", images)
    if mean.shape != images.shape[1:]:
        raise ValueError(
            f"mean must have shape {list(images.shape[1:])} to match the images, "
            f"got {list(mean.shape)}"
        )


def _extract_patches_fake(
    images: Tensor, size: int, stride: int, mean: Tensor | None = None
) -> Tensor:
    _check_extract_patches(images, mean)
    rows, columns = _grid(images, size, stride)
    shape = (images.shape[0], rows, columns, images.shape[1], size, size)
    return images.new_empty(shape, dtype=images.dtype if mean is None else torch.float32)


def _extract_patches(images: Tensor, size: int, stride: int, mean: Tensor | None = None) -> Tensor:
    patches = _extract_patches_fake(images, size, stride, mean)
    images = images.contiguous()
    mean = None if mean is None else mean.contiguous()
    count, channels, height, width = images.shape
    cells = _grid(images, size, stride)
    with _backend(images) as (backend, context):
        backend.extract_patches(
            grid=_native_grid(count, channels, (height, width), cells, size, stride),
            images=images.data_ptr(),
            mean=0 if mean is None else mean.data_ptr(),
            patches=patches.data_ptr(),
            element_size=images.element_size(),
            pixel_type=_PIXEL_TYPES.get(images.dtype, _native.PixelType.FLOAT32),
            context=context,
        )
    return patches


def _extract_patches_backward_fake(
    patch_gradients: Tensor, stride: int, height: int, width: int
) -> Tensor:
    check_shape("patch_gradients", patch_gradients, "N, I, J, C, K, K")
    check_dtype("patch_gradients", patch_gradients, torch.float32, torch.float64)
    count, channels = patch_gradients.shape[0], patch_gradients.shape[3]
    return patch_gradients.new_empty(count, channels, height, width)


def _extract_patches_backward(
    patch_gradients: Tensor, stride: int, height: int, width: int
) -> Tensor:
    image_gradients = _extract_patches_backward_fake(patch_gradients, stride, height, width)
    patch_gradients = patch_gradients.contiguous()
    count, rows, columns, channels, size, _ = patch_gradients.shape
    with _backend(patch_gradients) as (backend, context):
        backend.extract_patches_backward(
            grid=_native_grid(count, channels, (height, width), (rows, columns), size, stride),
            patch_gradients=patch_gradients.data_ptr(),
            image_gradients=image_gradients.data_ptr(),
            is_double=patch_gradients.dtype == torch.float64,
            context=context,
        )
    return image_gradients


def _extract_patches_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, stride, mean = inputs
    ctx.stride = stride
    ctx.pixels = images.shape[-2:]
    ctx.dtype = images.dtype
    ctx.normalized = mean is not None


def _extract_patches_autograd(ctx: Any, patch_gradients: Tensor) -> tuple[Tensor | None, ...]:
    if patch_gradients.dtype not in (torch.float32, torch.float64):
        patch_gradients = patch_gradients.float()  # halves are summed in float32
    gradients = torch.ops.patchsvdd_fast.extract_patches_backward(
        patch_gradients, ctx.stride, *ctx.pixels
    )
    mean_gradients = None
    if ctx.normalized:
        gradients = gradients / 255
        mean_gradients = -gradients.sum(dim=0)
    image_gradients = gradients.to(ctx.dtype) if ctx.dtype.is_floating_point else None
    return image_gradients, None, None, mean_gradients


# --- score_map ------------------------------------------------------------------------------------


def _score_map_fake(distances: Tensor, size: int, stride: int, height: int, width: int) -> Tensor:
    check_shape("distances", distances, "N, I, J")
    check_dtype("distances", distances, torch.float32)
    expected = PatchLevel(size, stride).grid_shape(height, width)
    if tuple(distances.shape[1:]) != expected:
        raise ValueError(
            f"distances must have shape [N, {expected[0]}, {expected[1]}] for patches of {size} "
            f"pixels at stride {stride} over {height}x{width} pixels, got {list(distances.shape)}"
        )
    return distances.new_empty(distances.shape[0], height, width)


def _score_map(distances: Tensor, size: int, stride: int, height: int, width: int) -> Tensor:
    maps = _score_map_fake(distances, size, stride, height, width)
    distances = distances.contiguous()
    count, rows, columns = distances.shape
    row_sums = distances.new_empty(count, rows, width, dtype=torch.float64)
    with _backend(distances) as (backend, context):
        backend.score_map(
            grid=_native_grid(count, 1, (height, width), (rows, columns), size, stride),
            distances=distances.data_ptr(),
            row_sums=row_sums.data_ptr(),
            maps=maps.data_ptr(),
            context=context,
        )
    return maps


# --- nearest --------------------------------------------------------------------------------------


def _nearest_fake(
    queries: Tensor,
    bank: Tensor,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    check_search_operands(queries, bank)
    check_groups(queries, bank.shape[0], query_groups, bank_groups, rows_per_group)
    count = queries.shape[0]
    return queries.new_empty(count), queries.new_empty(count, dtype=torch.int64)


def _nearest(
    queries: Tensor,
    bank: Tensor,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    distances, indices = _nearest_fake(queries, bank, query_groups, bank_groups, rows_per_group)
    check_finite_rows("queries", queries)
    check_finite_rows("bank", bank)
    count, rows = queries.shape[0], bank.shape[0]
    query_groups, bank_groups = _contiguous(query_groups), _contiguous(bank_groups)
    queries, bank = queries.contiguous(), bank.contiguous()
    with _backend(queries) as (backend, context):
        method = getattr(_native.SearchMethod, _method.get().upper())
        size = backend.nearest_workspace(
            queries=count,
            rows=rows,
            dim=bank.shape[1],
            method=method,
            has_groups=query_groups is not None,
            limit=_workspace_limit.get(),
        )
        workspace = _new_workspace(queries, size)
        backend.nearest(
            queries=count,
            bank_rows=rows,
            dim=bank.shape[1],
            query_data=queries.data_ptr(),
            bank_data=bank.data_ptr(),
            bank_is_half=bank.dtype == torch.float16,
            method=method,
            query_groups=_pointer(query_groups),
            bank_groups=_pointer(bank_groups),
            rows_per_group=rows_per_group,
            distances=distances.data_ptr(),
            indices=indices.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=_workspace_limit.get(),
            context=context,
        )
    return distances, indices


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- nearest_in_clusters --------------------------------------------------------------------------


def _nearest_in_clusters_fake(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], query_groups, bank_groups, rows_per_group)


def _nearest_in_clusters(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    distances, indices = _nearest_in_clusters_fake(
        queries, bank, stretch, query_groups, bank_groups, rows_per_group
    )
    check_finite_rows("queries", queries)
    queries = queries.contiguous()
    query_groups, bank_groups = _contiguous(query_groups), _contiguous(bank_groups)
    _native.cpu.nearest_in_clusters(
        bank=ClusterArrays(*bank).native(stretch),
        queries=queries.shape[0],
        query_data=queries.data_ptr(),
        query_groups=_pointer(query_groups),
        bank_groups=_pointer(bank_groups),
        rows_per_group=rows_per_group,
        distances=distances.data_ptr(),
        indices=indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return distances, indices


# --- nearest_in_segments: clusters on a GPU -------------------------------------------------------

SEGMENT_ROWS = 256
"""Most rows of a segment of a clustered bank on a GPU."""


def visit_tile(embeddings: Tensor) -> int:
    """Queries that look at the same segments of a bank of embeddings [M, D] there."""
    with _backend(embeddings) as (backend, _):
        return _as_cuda(backend).visit_tile(embeddings.shape[1])


def padded_code_dim(embeddings: Tensor) -> int:
    """Coordinates of the codes of embeddings [M, D] on a GPU, padding included."""
    with _backend(embeddings) as (backend, _):
        return _as_cuda(backend).padded_dim(embeddings.shape[1])


def encode_segments(arrays: SegmentArrays) -> None:
    """Fill in the codes of a bank on a GPU, and what is known of them."""
    with _backend(arrays.data) as (backend, context):
        cuda = _as_cuda(backend)
        assert cuda.SEGMENT_ROWS == SEGMENT_ROWS
        cuda.encode_segments(bank=arrays.native(cuda), context=context)


def _nearest_in_segments_fake(
    queries: Tensor,
    bank: list[Tensor],
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], query_groups, bank_groups, rows_per_group)


def _nearest_in_segments(
    queries: Tensor,
    bank: list[Tensor],
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    _nearest_in_segments_fake(queries, bank, query_groups, bank_groups, rows_per_group)
    check_finite_rows("queries", queries)
    return search_segments(
        queries.contiguous(),
        SegmentArrays(*bank),
        _contiguous(query_groups),
        _contiguous(bank_groups),
        rows_per_group,
    )


def search_segments(
    queries: Tensor,
    arrays: SegmentArrays,
    query_groups: Tensor | None,
    bank_groups: Tensor | None,
    rows_per_group: int,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest rows to queries [Q, D]; arguments are contiguous and checked.

    visits: [1] int64, raised by the number of pairs of a tile of queries and a segment looked at.
    """
    # Neighbours in the order of centroids want the same clusters.
    _, own = _nearest(queries, arrays.centroids)
    own, order = own.sort(stable=True)
    centroids = torch.arange(len(arrays.centroids) + 1, device=own.device)
    own_starts = torch.searchsorted(own, centroids)
    sorted_queries = queries[order]
    sorted_groups = None if query_groups is None else query_groups[order]
    distances, indices = torch.empty_like(queries[:, 0]), torch.empty_like(own)
    with _backend(queries) as (backend, context):
        cuda = _as_cuda(backend)
        bank = arrays.native(cuda)
        limit = _workspace_limit.get()
        size = cuda.nearest_in_segments_workspace(bank=bank, queries=len(queries), limit=limit)
        workspace = _new_workspace(queries, size)
        cuda.nearest_in_segments(
            bank=bank,
            queries=len(queries),
            query_data=sorted_queries.data_ptr(),
            own=own.data_ptr(),
            own_starts=own_starts.data_ptr(),
            query_groups=_pointer(sorted_groups),
            bank_groups=_pointer(bank_groups),
            rows_per_group=rows_per_group,
            distances=distances.data_ptr(),
            indices=indices.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=limit,
            visits=_pointer(visits),
            context=context,
        )
    return (
        torch.empty_like(distances).index_copy_(0, order, distances),
        torch.empty_like(indices).index_copy_(0, order, indices),
    )


def _as_cuda(backend: Any) -> type[_native.Cuda]:
    if backend is _native.cpu:
        raise TypeError("a bank clustered for a GPU can only be searched there")
    return backend


# --- crop_pairs -----------------------------------------------------------------------------------


def _crop_pairs_fake(
    images: Tensor,
    mean: Tensor,
    image_of: Tensor,
    size: int,
    kind: str,
    seed: int,
    step: int,
    redraw_clipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_extract_patches(images, mean)
    check_dtype("images", images, torch.uint8)
    check_pairs(images, image_of, size, kind, step, redraw_clipped)
    pairs, channels = image_of.shape[0], images.shape[1]
    return (
        mean.new_empty(2, pairs, channels, size, size),
        image_of.new_empty(2, pairs, 2),
        image_of.new_empty(pairs),
    )


def _crop_pairs(
    images: Tensor,
    mean: Tensor,
    image_of: Tensor,
    size: int,
    kind: str,
    seed: int,
    step: int,
    redraw_clipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    patches, corners, labels = _crop_pairs_fake(
        images, mean, image_of, size, kind, seed, step, redraw_clipped
    )
    count, channels, height, width = images.shape
    if image_of.device.type == "cpu":  # elsewhere, looking would wait for the device
        check_indices("image_of", image_of, count)
    images, mean, image_of = images.contiguous(), mean.contiguous(), image_of.contiguous()
    with _backend(images) as (backend, context):
        backend.crop_pairs(
            images=count,
            channels=channels,
            height=height,
            width=width,
            pairs=image_of.shape[0],
            size=size,
            neighbours=kind == "neighbour",
            max_redraws=MAX_REDRAWS if redraw_clipped else 0,
            seed=seed % 2**64,
            step=step,
            colour_shift=COLOUR_SHIFT,
            pixel_noise=PIXEL_NOISE,
            pixels=images.data_ptr(),
            mean=mean.data_ptr(),
            image_of=image_of.data_ptr(),
            patches=patches.data_ptr(),
            corners=corners.data_ptr(),
            labels=labels.data_ptr(),
            context=context,
        )
    return patches, corners, labels


# --- registration ---------------------------------------------------------------------------------

_BOTH = ("CPU", "CUDA")
for _name, _kernel, _fake, _devices in (
    ("extract_patches", _extract_patches, _extract_patches_fake, _BOTH),
    ("extract_patches_backward", _extract_patches_backward, _extract_patches_backward_fake, _BOTH),
    ("score_map", _score_map, _score_map_fake, _BOTH),
    ("nearest", _nearest, _nearest_fake, _BOTH),
    ("nearest_in_clusters", _nearest_in_clusters, _nearest_in_clusters_fake, ("CPU",)),
    ("nearest_in_segments", _nearest_in_segments, _nearest_in_segments_fake, _BOTH),
    ("crop_pairs", _crop_pairs, _crop_pairs_fake, _BOTH),
):
    for _device in _devices:
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"patchsvdd_fast::{_name}", _fake, lib=_library)

torch.library.register_autograd(
    "patchsvdd_fast::extract_patches",
    _extract_patches_autograd,
    setup_context=_extract_patches_setup,
    lib=_library,
)


# --- public functions -----------------------------------------------------------------------------


def extract_patches(images: Tensor, size: int, stride: int, mean: Tensor | None = None) -> Tensor:
    """Cut every `size` x `size` patch of a regular grid out of each image.

    images: [N, C, H, W], uint8, float16 or float32 (bfloat16, float64 too without `mean`).
    size, stride: pixels, `1 <= stride <= size`.
    mean: [C, H, W] float32; if given, the patches hold `(pixel - mean) / 255` in float32.

    Returns [N, I, J, C, K, K] with I = (H - K) // stride + 1, J alike. Differentiable with respect
    to images and mean. Raises ValueError for a wrong shape, TypeError for a wrong dtype.
    """
    patches: Tensor = torch.ops.patchsvdd_fast.extract_patches(images, size, stride, mean)
    return patches


def score_map(
    distances: Tensor | FloatArray, size: int, stride: int, height: int, width: int
) -> Tensor:
    """Spread patch distances over the pixels: each is the mean over the patches that cover it.

    distances: [N, I, J] float32, one per patch of a grid of `size` and `stride` (pixels) over
    images of `height` x `width`; a tensor, a NumPy array, or one with DLPack (CuPy). Returns
    [N, H, W] float32, a NumPy array for one, else a tensor; sums are float64 inside. Pixels of a
    margin that no patch reaches repeat the nearest covered pixel. Yi & Yoon (2020), section 3.4.
    """
    maps: Tensor = torch.ops.patchsvdd_fast.score_map(
        as_tensor("distances", distances), size, stride, height, width
    )
    return like_input(distances, maps)[0]


def nearest(
    queries: Tensor | FloatArray,
    bank: Tensor | FloatArray,
    *,
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact L2 distance from each query to its nearest bank row, and that row's index.

    queries: [Q, D] float32, bank: [M, D] float32 or float16, M >= 1, same device; tensors, NumPy
    arrays, or arrays of another library with DLPack (CuPy). exclude_same_group: int64 groups of the
    queries [Q] and of the bank rows [M]; rows of a query's own group are passed over. progress:
    called now and then with the share done.

    Returns distances [Q] float32 and indices [Q] int64, the lowest on ties; infinity and -1 where
    every row is excluded; NumPy arrays if `queries` is one. The result is that of the canonical
    distance (see `reference.canonical_squared_distances`), bit for bit, on every backend. Not
    differentiable. Raises ValueError naming the first row that holds NaN or infinity;
    KeyboardInterrupt within a fraction of a second of Ctrl-C (on the CPU).

    Can be captured in a CUDA graph. Values cannot be checked then: a query that holds NaN gets the
    distance NaN instead of an error, and a bank row that holds NaN is nobody's nearest.
    """
    query_tensor, bank_tensor = as_tensor("queries", queries), as_tensor("bank", bank)
    query_groups, bank_groups = (
        (None, None)
        if exclude_same_group is None
        else map(as_tensor, ("query_groups", "bank_groups"), exclude_same_group)
    )
    with _reporting(progress):
        found = torch.ops.patchsvdd_fast.nearest(
            query_tensor, bank_tensor, query_groups, bank_groups
        )
    return like_input(queries, *found)


def nearest_in_bank(
    queries: Tensor,
    bank: Tensor | ClusterArrays | SegmentArrays,
    stretch: float = 1.0,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `nearest`, in a plain bank or one made by `build_clusters` or `build_segments` (GPU).

    queries: [Q, D] float32. query_groups: [Q] int64; bank_groups: int64, the group of row r is
    entry r // rows_per_group.
    """
    op = torch.ops.patchsvdd_fast
    groups = (query_groups, bank_groups, rows_per_group)
    with _reporting(progress):
        if isinstance(bank, Tensor):
            return op.nearest(queries, bank, *groups)
        if isinstance(bank, SegmentArrays):
            return op.nearest_in_segments(queries, list(bank), *groups)
        return op.nearest_in_clusters(queries, list(bank), stretch, *groups)


def crop_pairs(
    images: Tensor,
    mean: Tensor,
    image_of: Tensor,
    size: int,
    kind: PairKind,
    seed: int,
    step: int,
    redraw_clipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random pairs of patches to train on, after the protocol in `sampling`.

    images: [N, C, H, W] uint8, N >= 1; mean: [C, H, W] float32; image_of: [B] int64, the image
    that each pair is from; all on one device. size: K, pixels; at least 4 for "position" pairs, 32
    for "neighbour" pairs. seed: 64 bits; step: 0 .. 2^32 - 1, which draw from the seed.
    redraw_clipped: draw position pairs that would be clipped again, up to `MAX_REDRAWS` times.

    Returns the first and the second patches as [2, B, C, K, K] float32, `(pixel - mean) / 255`,
    those of position pairs shifted in colour and with noise; their corners [2, B, 2] int64 (top
    and left, pixels); and labels [B] int64: of a position pair the direction drawn, before
    clipping, as an index into `DIRECTIONS`, else 0.

    A pair is a function of its image, the seed, the step, its number in the batch, the size and
    the kind alone, the same to the bit on every backend. Not differentiable. Raises ValueError for
    wrong shapes and values, TypeError for a wrong dtype. An image number out of range is an error
    on the CPU; elsewhere the nearest image is taken. Yi & Yoon (2020), sections 3.2 and 3.3.
    """
    signed = seed - 2**64 if seed >= 2**63 else seed  # an op takes integers of 64 bits with a sign
    patches, corners, labels = torch.ops.patchsvdd_fast.crop_pairs(
        images, mean, image_of, size, kind, signed, step, redraw_clipped
    )
    return patches, corners, labels


@contextlib.contextmanager
def _calling_back(progress: Callable[[float], None]) -> Iterator[None]:
    before = _native.cpu.set_progress(progress)
    try:
        yield
    finally:
        _native.cpu.set_progress(before)


def _reporting(progress: Callable[[float], None] | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if progress is None else _calling_back(progress)
