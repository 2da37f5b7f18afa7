"""Export as ONNX models, for runtimes other than PyTorch: a whole detector, or its encoder alone.

`export_detector` writes a model from pixels to image scores, anomaly maps and verdicts. With the
model of `export_encoder` the runtime embeds images whose light has been matched, the search stays
in this library, and `PatchSVDD.score_encoded` scores them as the detector would (docs/onnx.md)::

    images = match_illumination(detector.load_images("images/new").pixels, detector.usual_light())
    outputs = runtime.run(None, {"images": images.numpy()})  # uint8 [N, 3, H, W] -> [N, I, J, D]
    embeddings = [torch.from_numpy(output) for output in outputs]
    detector.score_encoded(embeddings, (height, width))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.onnx_encoder import add_encoder
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import HierarchicalEncoder
from ..files.onnx_graph import Graph, Values
from ..files.whole import written_whole
from ..images.onnx_pixels import add_matching, add_normalizing, add_resizing
from ..ops.checks import check_dtype, check_shape
from ..score.encoding import encode_images
from ..score.onnx_scoring import BankNodes, add_combination, add_distances, add_map, add_weights
from ..search.bank import NormalBank
from . import scoring
from .normality import whole_bank
from .onnx_check import check_embeddings, check_scores, outputs_of, random_images
from .patch_svdd import PatchSVDD

STORAGES = {"float32": 4, "float16": 2}
"""What a bank's rows may be kept in, and the bytes of a coordinate."""

LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights that a model may have: protobuf, the format of ONNX, ends at 2 GiB."""


def export_detector(
    detector: PatchSVDD,
    path: str | Path,
    *,
    false_alarm_rate: float | None = None,
    storage: str = "float32",
) -> float | None:
    """Write a fitted detector as one ONNX model, from pixels to verdicts, atomically.

    The model's input is "images", uint8 [N, 3, H, W], RGB. N is free. H and W are free where the
    detector resizes images, which the model then does, too, and where any size will do (Patch
    SVDD's encoder with mean="channel" and image_size=None); else they are those of the training
    images. Its outputs, with H and W of the images as they are scored:

    - "score", float32 [N]: `ScoreResult.image_scores`.
    - "anomaly_map", float32 [N, H, W]: `ScoreResult.anomaly_map`.
    - "anomalous", bool [N]: whether the score exceeds the threshold. A detector of a single
      training image has no threshold, and its model no such output.

    The model's metadata say what it was made from, see docs/onnx.md.

    path: file to write.
    false_alarm_rate: share of good images that may be called anomalous; None: `threshold_`.
    storage: of the banks' rows in the file: "float32", or "float16" for half the size, which
        changes distances by its rounding.

    Pictures of some training images, or random images if none are kept, are scored by onnxruntime
    and by the detector. Returns the largest relative difference of their image scores; None, with a
    warning, if onnxruntime is not installed. Raises RuntimeError, and writes nothing, if embeddings
    differ by more than ten times PyTorch's own rounding, or scores of the same embeddings by more
    than 1e-3 (unless rows are in float16); NotFittedError before `fit`; ValueError for a rate that
    cannot be promised, weights of more than `LARGEST_FILE`, banks that were not encoded in float32,
    and if onnx is not installed; OSError if the file cannot be written.
    """
    _require_exportable(detector)
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {tuple(STORAGES)}, got {storage!r}")
    banks = _banks_in_use(detector)
    _check_weights(detector.encoder_, banks, storage)
    rate = false_alarm_rate
    if rate is None and detector.calibration_ is not None:
        rate = detector.false_alarm_rate_
    threshold = None if rate is None else detector.threshold(rate)
    graph, embeddings = _scoring_graph(detector, banks, storage, threshold)
    size = _size(detector)
    given = "HW" if detector.parameters_["image_size"] is not None or size is None else size
    outputs: dict[str, Values] = {
        "score": (torch.float32, ["N"]),
        "anomaly_map": (torch.float32, ["N", *(size or "HW")]),
        **({} if threshold is None else {"anomalous": (torch.bool, ["N"])}),
    }
    inner = _of_levels(detector.encoder_, list(banks), size, embeddings)
    model = graph.model(
        "detector",
        {"images": (torch.uint8, ["N", 3, *given])},
        outputs | inner,
        _metadata(detector, threshold, rate, storage),
    )
    difference = check_scores(detector, model.SerializeToString(), len(outputs), banks, storage)
    del model.graph.output[len(outputs) :]  # the embeddings, which were only to be checked
    with written_whole(Path(path)) as partial:
        partial.write_bytes(model.SerializeToString())
    return difference


def export_encoder(detector: PatchSVDD, path: str | Path) -> float | None:
    """Write a fitted detector's encoder as an ONNX model with `export_onnx`.

    Returns and raises what `export_onnx` does; raises NotFittedError before `fit`, and ValueError
    for banks that were not encoded in float32.
    """
    _require_exportable(detector)
    light = detector.usual_light()
    return export_onnx(detector.encoder_, path, detector.levels_, detector.mean_, light)


def export_onnx(
    encoder: PatchEncoder,
    path: str | Path,
    levels: Sequence[PatchLevel],
    mean: Tensor,
    light: Tensor | None = None,
) -> float | None:
    """Write `encoder.dense` of normalised images as an ONNX model, atomically.

    The model's input is "images", uint8 [N, 3, H, W]; it normalises them. Its outputs are "K64",
    "K32", ..., one per level, float32 [N, I, J, D]. N is free. H and W are those of the mean, or
    free for Patch SVDD's encoder if the mean has one value per channel.

    path: file to write.
    levels: patch levels of different sizes, as `encoder.dense` takes them.
    mean: [3, H, W] or [3, 1, 1] float32, in pixel values.
    light: [3] float32, the colour that images are to be matched to before they go into the model
        (`images.light.match_illumination`), in pixel values; None: they stay as they are.

    The model's metadata hold "levels" (JSON: a list of [size, stride]), "illumination" ("matched"
    or "as_is") and "light" (JSON: a list or null).

    Embeddings of random images are compared between onnxruntime and PyTorch. Returns the largest
    difference of a coordinate, which lies in (-1, 1); None, with a warning, if onnxruntime is not
    installed. Raises RuntimeError, and writes nothing, if the difference is more than ten times
    PyTorch's own rounding; ValueError or TypeError for levels, mean or light that do not fit;
    ValueError if onnx is not installed; OSError if the file cannot be written.
    """
    _require_onnx()
    _check_arguments(levels, mean, light)
    size = None if _suits_any_size(encoder, mean) else (mean.shape[1], mean.shape[2])
    mean = mean if size else mean[:, :1, :1]
    batches = _random_images(levels, size)
    for images in batches:  # raises for levels that it lacks
        encode_images(encoder, images, mean.expand(images.shape[1:]), levels)
    graph = Graph()
    pixels = graph.cast("images", torch.float32)
    normalized = add_normalizing(graph, pixels, _least(mean), encoder.pixel_scale)
    embeddings = add_encoder(graph, encoder, levels, normalized, size)
    outputs = _of_levels(encoder, levels, size, embeddings)
    named = {str(level): values for level, values in zip(levels, outputs.values(), strict=True)}
    for name, value in zip(named, embeddings, strict=True):
        graph.add("Identity", value, output=name)
    model = graph.model(
        "encoder",
        {"images": (torch.uint8, ["N", 3, *(size or "HW")])},
        named,
        _prepared(levels, light),
    ).SerializeToString()
    found = outputs_of(model, batches)
    difference = None
    if found is not None:
        difference = check_embeddings(found, encoder, batches, mean, levels)
    with written_whole(Path(path)) as partial:
        partial.write_bytes(model)
    return difference


# --- checks of arguments --------------------------------------------------------------------------


def _require_onnx() -> None:
    if find_spec("onnx") is None:
        raise ValueError("onnx is not installed: pip install onnx onnxruntime")


def _require_exportable(detector: PatchSVDD) -> None:
    detector._require_fitted()
    _require_onnx()
    precision = detector.parameters_["encoding_precision"]
    if precision != "float32":
        raise ValueError(
            f"the banks were encoded in {precision}, but ONNX models compute in float32: "
            'fit with encoding_precision="float32"'
        )


def _check_weights(
    encoder: PatchEncoder, banks: Mapping[PatchLevel, NormalBank], storage: str
) -> None:
    """Raise ValueError for more than fits in a file, before anything large is made."""
    rest = sum(4 * tensor.numel() for tensor in encoder.state_dict().values())
    rest += sum(4 * len(bank) for bank in banks.values())
    coordinates = sum(len(bank) * bank.dim for bank in banks.values())
    if rest + STORAGES[storage] * coordinates <= LARGEST_FILE:
        return
    helps = "fit with a coreset, such as coreset=0.1 (--coreset 0.1)"
    if rest + STORAGES["float16"] * coordinates <= LARGEST_FILE:
        helps += ', or keep rows in float16 (storage="float16", --storage float16)'
    raise ValueError(
        f"the banks' {sum(map(len, banks.values())):,} rows make a model of "
        f"{(rest + STORAGES[storage] * coordinates) / 1e9:.1f} GB, and a file in ONNX's format "
        f"holds {LARGEST_FILE / 1e9:.1f} GB: {helps}"
    )


def _check_arguments(levels: Sequence[PatchLevel], mean: Tensor, light: Tensor | None) -> None:
    if not levels:
        raise ValueError("levels must name at least one patch level")
    if len({level.size for level in levels}) < len(levels):
        raise ValueError(f"levels must differ in size, which names the outputs, got {levels}")
    check_shape("mean", mean, "3, H, W")
    check_dtype("mean", mean, torch.float32)
    if mean.shape[0] != 3:
        raise ValueError(f"mean must have shape [3, H, W], got {list(mean.shape)}")
    if light is not None and light.shape != (3,):
        raise ValueError(f"light must have shape [3], got {list(light.shape)}")


# --- the graph ------------------------------------------------------------------------------------


def _scoring_graph(
    detector: PatchSVDD,
    banks: Mapping[PatchLevel, NormalBank],
    storage: str,
    threshold: float | None,
) -> tuple[Graph, list[str]]:
    """From "images" to "score", "anomaly_map" and "anomalous"; and the embeddings of each level."""
    graph = Graph()
    encoder, parameters = detector.encoder_, detector.parameters_
    pixels = graph.cast("images", torch.float32)
    if parameters["image_size"] is not None:
        pixels = add_resizing(graph, pixels, *detector.image_shape())
    pixels = add_matching(graph, pixels, detector.usual_light())
    normalized = add_normalizing(graph, pixels, _least(detector.mean_), encoder.pixel_scale)
    embeddings = add_encoder(graph, encoder, list(banks), normalized, _size(detector))
    rule = scoring.map_rule(encoder, detector.calibration_)
    maps: dict[str, str] = {}
    factors = []
    for (level, bank), embedded in zip(banks.items(), embeddings, strict=True):
        rows, columns = level.grid_shape(*detector.image_shape())
        nodes = BankNodes(graph, str(level), bank, rows * columns, storage == "float16")
        distances = add_distances(graph, nodes, embedded)
        values, maps[str(level)] = add_map(graph, distances, level, rule, _size(detector) or pixels)
        if parameters["reweight"] is not None and len(bank) > 1:
            factors.append(add_weights(graph, nodes, embedded, values, parameters["reweight"]))
    joined = add_combination(graph, maps, parameters["combination"])
    graph.add("Identity", joined, output="anomaly_map")
    highest = graph.add("ReduceMax", joined, axes=[1, 2], keepdims=0)
    graph.add("Mul" if factors else "Identity", highest, *factors, output="score")
    if threshold is not None:
        graph.add("Greater", "score", graph.number(_rounded_down(threshold)), output="anomalous")
    return graph, embeddings


def _banks_in_use(detector: PatchSVDD) -> dict[PatchLevel, NormalBank]:
    """All, or that of the one level that the combination takes."""
    combination = detector.parameters_["combination"]
    banks = {level: whole_bank(bank) for level, bank in detector.banks_.items()}
    one = {level: bank for level, bank in banks.items() if str(level) == combination}
    return one or banks


def _least(mean: Tensor) -> Tensor:
    """The mean as [3, 1, 1] where it has one value per channel."""
    return mean[:, :1, :1] if bool((mean == mean[:, :1, :1]).all()) else mean


def _suits_any_size(encoder: PatchEncoder, mean: Tensor) -> bool:
    """Whether the encoder's nodes do, and the mean."""
    return isinstance(encoder, HierarchicalEncoder) and _least(mean).shape[1:] == (1, 1)


def _size(detector: PatchSVDD) -> tuple[int, int] | None:
    """(height, width) of images as they are encoded, in pixels; None: any."""
    resizes = detector.parameters_["image_size"] is not None
    if not resizes and _suits_any_size(detector.encoder_, detector.mean_):
        return None
    return detector.image_shape()


def _of_levels(
    encoder: PatchEncoder,
    levels: Sequence[PatchLevel],
    size: tuple[int, int] | None,
    names: Sequence[str],
) -> dict[str, Values]:
    """Type and shape of each level's embeddings, by name."""
    found: dict[str, Values] = {}
    for level, name in zip(levels, names, strict=True):
        grid = (f"I of {level}", f"J of {level}") if size is None else level.grid_shape(*size)
        found[name] = torch.float32, ["N", *grid, encoder.embedding_dim]
    return found


def _rounded_down(threshold: float) -> float:
    """The largest float32 up to a number: float32 scores exceed the one if they do the other."""
    nearest = np.float32(threshold)
    below = np.nextafter(nearest, np.float32(-np.inf))
    return float(nearest) if float(nearest) <= threshold else float(below)


def _prepared(levels: Sequence[PatchLevel], light: Tensor | None) -> dict[str, str]:
    """Metadata of what an encoder takes."""
    return {
        "levels": json.dumps([(level.size, level.stride) for level in levels]),
        "illumination": "as_is" if light is None else "matched",
        "light": json.dumps(None if light is None else light.tolist()),
    }


def _metadata(
    detector: PatchSVDD, threshold: float | None, rate: float | None, storage: str
) -> dict[str, str]:
    from .. import __version__

    parameters, samples = detector.parameters_, detector.samples_
    resized = None if parameters["image_size"] is None else detector.image_shape()
    values = {
        "threshold": threshold,
        "false_alarm_rate": rate,
        "image_size": resized,
        "combination": parameters["combination"],
        "encoder": parameters["encoder"],
        "reweight": parameters["reweight"],
        "bit_depth": samples.bit_depth,
        "value_range": samples.value_range,
        "training_images": detector.num_images,
        "bank_rows": {str(level): len(bank) for level, bank in detector.banks_.items()},
        "storage": storage,
        "version": __version__,
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return texts | _prepared(detector.levels_, detector.usual_light())


def _random_images(levels: Sequence[PatchLevel], size: tuple[int, int] | None) -> list[Tensor]:
    """Two uint8 batches [N, 3, H, W], of different sizes where these are free."""
    largest = max(level.size for level in levels)
    sizes = [size or (largest, largest + 33), size or (largest + 18, largest + 1)]
    return random_images([(count, 3, *of) for count, of in enumerate(sizes, start=1)])
