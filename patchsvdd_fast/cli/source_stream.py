"""A detector's stream over the sources of a command line, each result with its source."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..detector.patch_svdd import PatchSVDD
from ..files.sources import Source
from ..score.image_result import ImageResult


@contextmanager
def scored_sources(
    detector: PatchSVDD,
    sources: Iterable[Source],
    false_alarm_rate: float | None,
    on_error: Callable[[Path, Exception], None],
) -> Iterator[Iterator[tuple[Source, ImageResult]]]:
    """Gives the sources that can be read and their results, in order; others go to `on_error`."""
    waiting: deque[Source] = deque()  # those that are in the stream, in their order

    def paths() -> Iterator[Path]:
        for source in sources:
            waiting.append(source)
            yield source.path

    def skip(path: Path, error: Exception) -> None:
        waiting.popleft()
        on_error(path, error)

    with detector.score_stream(paths(), false_alarm_rate=false_alarm_rate, on_error=skip) as stream:
        yield ((waiting.popleft(), result) for result in stream)
