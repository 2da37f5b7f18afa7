"""Scoring a stream of images in stages that run at once: read, encode, search, the caller's work.

Each stage runs in a thread of its own and passes its results on through a short queue, so a stream
of any length takes bounded memory. Results come in the order of the items, as soon as possible.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NoReturn, TypeVar

from ..images.prepare import PreparedImage
from ..search.rounds import Rounds

Result = TypeVar("Result")
Encoded = tuple[list[PreparedImage], Any]

_READERS = 2  # threads
_IMAGES_AHEAD = 8  # that may wait to be encoded
_MOST_AT_ONCE = 8  # images encoded and searched together, ...
_PIXELS_AT_ONCE = _MOST_AT_ONCE << 16  # ... with at most this many pixels: 8 images of 256x256
_BATCHES_AHEAD = 1  # that may wait for each of the later stages
_POLL = 0.1  # seconds between looks whether the stream was closed


class Stream(Generic[Result]):
    """An iterator, for `for` and `async for`, over the results of items in their order.

    items: iterated in a thread of its own.
    read: makes a prepared image from an item and its number; called in several threads.
    encode: encodes a batch of images of one size.
    search: makes one result per image from what `encode` returned.
    on_error: called in the caller's thread, in the items' order, with an item that could not be
        read (ValueError, TypeError, OSError); it is then skipped. None: the error is raised, and
        ends the stream.
    rounds: that `search` takes part in, with other processes; the stream ends when theirs do.

    Use it as a context manager, or `close` it, to end its threads before its items end; they end
    with the iterator, too. It belongs to the process that made it: it cannot be pickled, and in a
    child of a fork it raises RuntimeError.
    """

    def __init__(
        self,
        items: Iterable[Any],
        read: Callable[[Any, int], PreparedImage],
        encode: Callable[[list[PreparedImage]], Encoded],
        search: Callable[[Encoded], list[Result]],
        on_error: Callable[[Any, Exception], None] | None = None,
        rounds: Rounds[Any, Any] | None = None,
    ) -> None:
        self._stages = _Stages(items, read, encode, search, rounds)
        self._rounds = rounds
        self._on_error = on_error
        self._ready: Iterator[Any] = iter(())

    def __iter__(self) -> Stream[Result]:
        return self

    def __next__(self) -> Result:
        with self._closed_by_errors():
            while (result := self._next_ready()) is None:
                found = self._stages.next_results()
                if found is None:
                    if self._rounds is not None:
                        self._rounds.wait()
                    raise StopIteration
                self._ready = iter(found)
        return result

    def __aiter__(self) -> Stream[Result]:
        return self

    async def __anext__(self) -> Result:
        with self._closed_by_errors():
            while (result := self._next_ready()) is None:
                found = await self._stages.awaited_results()
                if found is None:
                    if self._rounds is not None:
                        await asyncio.to_thread(self._rounds.wait)
                    raise StopAsyncIteration
                self._ready = iter(found)
        return result

    def __enter__(self) -> Stream[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stages") and self._stages.is_here:
            self._stages.closed.set()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream has threads and cannot be pickled: pass on its results instead")

    def close(self) -> None:
        """End the stream; what was not taken yet is dropped."""
        self._ready = iter(())
        self._stages.close()

    def _next_ready(self) -> Result | None:
        """The next result that is ready; None if there is none."""
        for result in self._ready:
            if not isinstance(result, _Unreadable):
                found: Result = result
                return found
            if self._on_error is None:
                raise result.error
            self._on_error(result.item, result.error)
        return None

    @contextlib.contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        self._stages.check_here()
        try:
            yield
        except asyncio.CancelledError:  # ends only the caller's wait: no result was taken
            raise
        except BaseException:
            self.close()
            raise


class _Stages:
    """The threads of a stream. They hold no reference to it: once nobody uses it, they end."""

    def __init__(
        self,
        items: Iterable[Any],
        read: Callable[[Any, int], PreparedImage],
        encode: Callable[[list[PreparedImage]], Encoded],
        search: Callable[[Encoded], list[Any]],
        rounds: Rounds[Any, Any] | None,
    ) -> None:
        self._items, self._read, self._encode, self._search = items, read, encode, search
        self._rounds = rounds
        self.closed = threading.Event()
        self._process = os.getpid()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="patchsvdd-read")
        self._read_ahead: queue.Queue[Any] = queue.Queue(_IMAGES_AHEAD)
        self._encoded: queue.Queue[Any] = queue.Queue(_BATCHES_AHEAD)
        self._found: queue.Queue[Any] = queue.Queue(_BATCHES_AHEAD)
        self._wake_waiter: Callable[[], object] = _nobody_waits
        stages = (
            (self._read_items, self._read_ahead),
            (self._encode_batches, self._encoded),
            (self._search_batches, self._found),
        )
        self._threads = [
            # In a copy of the caller's context, for settings such as ops.use_method.
            threading.Thread(
                target=contextvars.copy_context().run, args=(self._run, *stage), daemon=True
            )
            for stage in stages
        ]
        _running.add(self)
        for thread in self._threads:
            thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this process has the threads; a child of a fork does not."""
        return self._process == os.getpid()

    def check_here(self) -> None:
        """Raise RuntimeError in a child of a fork."""
        if not self.is_here:
            raise RuntimeError(
                "this stream was made before the process forked, and its threads are those of the "
                "parent: call score_stream in the child"
            )

    def next_results(self) -> list[Any] | None:
        """The results of a batch, or one unreadable item; None at the end.

        Raises what a stage raised.
        """
        try:
            found: list[Any] = self._get(self._found)
            return found
        except _StreamEnd:
            return None

    async def awaited_results(self) -> list[Any] | None:
        """As `next_results`, awaited; if it is cancelled, no result is lost."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(arrived.set)

        self._wake_waiter = wake
        while self._found.empty() and not self.closed.is_set():
            await arrived.wait()
            arrived.clear()
        return self.next_results()

    def close(self) -> None:
        if not self.is_here:  # its locks may be held by threads that are not here
            return
        self.closed.set()
        self._wake_waiter()
        self._readers.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads[1:]:  # not the first: it may wait long for an item
            thread.join()

    def _run(self, stage: Callable[[], None], out: queue.Queue[Any]) -> None:
        """Run a stage to its end, and tell the next stage how it ended."""
        try:
            stage()
            end: BaseException = _StreamEnd()
        except BaseException as error:
            end = error
        with contextlib.suppress(_StreamEnd):
            self._put(out, _Raised(end))

    def _read_items(self) -> None:
        for number, item in enumerate(self._items):
            if self.closed.is_set():
                return
            reading = self._readers.submit(self._read, item, number)
            self._put(self._read_ahead, (item, reading))

    def _encode_batches(self) -> None:
        batch: list[PreparedImage] = []
        while True:
            item, reading = self._get(self._read_ahead)
            try:
                image = self._wait_for(reading)
            except (ValueError, TypeError, OSError) as error:
                self._encode_batch(batch)
                self._put(self._encoded, _Unreadable(item, error))
                continue
            except _StreamEnd:
                raise
            except BaseException:
                self._encode_batch(batch)
                raise
            if batch and image.pixels.shape != batch[0].pixels.shape:
                self._encode_batch(batch)
            batch.append(image)
            # Do not wait to fill the batch: that would delay the images in it.
            if len(batch) >= _most_at_once(image) or not self._next_is_read():
                self._encode_batch(batch)

    def _encode_batch(self, batch: list[PreparedImage]) -> None:
        images = batch.copy()
        batch.clear()
        if images:
            self._put(self._encoded, self._encode(images))

    def _next_is_read(self) -> bool:
        with self._read_ahead.mutex:
            waiting = self._read_ahead.queue
            return bool(waiting) and isinstance(waiting[0], tuple) and waiting[0][1].done()

    def _search_batches(self) -> None:
        finished = False
        try:
            while True:
                given = self._get(self._encoded)
                found = [given] if isinstance(given, _Unreadable) else self._search(given)
                self._put(self._found, found)
        except _StreamEnd:
            finished = not self.closed.is_set()
            raise
        finally:
            if self._rounds is not None:
                self._rounds.close(finished)

    # The three waits: each raises _StreamEnd once the stream is closed.

    def _put(self, out: queue.Queue[Any], thing: Any) -> None:
        while not self.closed.is_set():
            try:
                out.put(thing, timeout=_POLL)
            except queue.Full:
                continue
            self._wake_waiter()
            return
        raise _StreamEnd

    def _get(self, source: queue.Queue[Any]) -> Any:
        while not self.closed.is_set():
            try:
                thing = source.get(timeout=_POLL)
            except queue.Empty:
                continue
            if isinstance(thing, _Raised):
                raise thing.error
            return thing
        raise _StreamEnd

    def _wait_for(self, reading: Future[PreparedImage]) -> PreparedImage:
        while not self.closed.is_set():
            if wait([reading], timeout=_POLL).done:
                return reading.result()
        raise _StreamEnd


_running: weakref.WeakSet[_Stages] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def _close_all() -> None:
    """End all threads: one in native code when the interpreter has exited aborts the process."""
    for stages in list(_running):
        stages.close()


def _nobody_waits() -> None:
    """Does nothing: what is called to wake the caller until it first waits."""


def _most_at_once(image: PreparedImage) -> int:
    """How many images of this one's size are encoded together; below 2, each alone."""
    height, width = image.pixels.shape[1:]
    return min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // (height * width))


class _StreamEnd(Exception):  # noqa: N818
    """There are no more items, or the stream was closed."""


class _Raised:
    """In a queue: the exception with which the stage before ended."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Unreadable:
    """In a queue: an item that could not be read, to be reported to the caller."""

    def __init__(self, item: Any, error: Exception) -> None:
        self.item, self.error = item, error
