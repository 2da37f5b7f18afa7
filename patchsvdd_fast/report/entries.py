"""Turn a detector's results into entries of an HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import __version__
from ..detector.patch_svdd import PatchSVDD
from ..files.folders import counted
from ..score.image_result import ImageResult
from ..score.regions import Region
from .heat_maps import scale_map, smooth_map
from .html import Finding, ReportEntry, ReportWriter

_MOST_FINDINGS = 20  # of an image: where all of it is anomalous, regions may be hundreds


def open_report(
    folder: Path,
    detector: PatchSVDD,
    threshold: float | None,
    title: str = "Anomaly scores",
    false_alarm_rate: float | None = None,
    facts: Mapping[str, str] | None = None,
) -> ReportWriter:
    """Begin a report of images that this detector scores, `folder`/index.html.

    threshold: image score above which an image is called anomalous, shown in the report.
    title: heading of the page. false_alarm_rate: that of the threshold; None: the detector's own.
    facts: what else to say of these images, values by name, such as {"model": "a.safetensors"};
    the encoder, the levels and the time are said anyway.
    """
    levels = [
        f"{level.size} pixels every {level.stride} ({len(bank):,} in the bank of {level})"
        for level, bank in detector.banks_.items()
    ]
    height, width = detector.image_shape()
    facts = {
        **(facts or {}),
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "encoder": str(detector.parameters_["encoder"]),
        "patches": ", ".join(levels),
        "image size": f"{width}x{height} pixels",
    }
    if len(levels) > 1:
        facts["maps are joined by"] = str(detector.parameters_["combination"])
    if detector.reweight is not None:
        facts["image scores are re-weighted by"] = counted(detector.reweight, "neighbour")
    scores: list[float] = []
    promised = None
    if detector.calibration_ is not None:
        scores = detector.calibration_.image_scores.tolist()
        facts["training images"] = str(detector.calibration_.num_images)
    if threshold is not None:
        promised = false_alarm_rate or detector.false_alarm_rate_
        facts["promised"] = (
            f"at most {promised:.2%} false alarms on good images like the training images"
        )
    facts["patchsvdd_fast"] = __version__
    return ReportWriter(folder, title, facts, threshold, scores, promised=promised)


def report_entry(
    detector: PatchSVDD,
    result: ImageResult,
    regions: Sequence[Region],
    label: str | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> ReportEntry:
    """What the report shows of a scored image.

    regions: those of `detector.explain`, the most anomalous first; the first 20 are shown.
    label: "good" or the defect's name; None if unknown.
    mask: bool [H, W] of any size, True where anomalous; None if unknown.
    """
    picture = result.original_picture
    if mask is not None and mask.shape != (picture.height, picture.width):
        mask = np.asarray(Image.fromarray(mask).resize(picture.size))
    return ReportEntry(
        name=result.name,
        picture=picture,
        heat=scale_map(smooth_map(result.scores), result.map_threshold),
        score=result.score,
        p_value=result.p_value,
        anomalous=result.anomalous,
        label=label,
        mask=mask,
        findings=[_finding(detector, region) for region in regions[:_MOST_FINDINGS]],
        notes=result.unusual,
        map_threshold=result.map_threshold,
    )


def _finding(detector: PatchSVDD, region: Region) -> Finding:
    names = () if detector.gallery_ is None else detector.gallery_.names
    picture = detector.match_picture(region)
    if names.count(region.match_name) > 1:  # as after `merge`; a report knows images by name
        unique = f"{region.match_name} (image {region.match_image})"
        region = replace(region, match_name=unique)
    return Finding(region, picture)
