"""Streams: results in order, bounded read-ahead, errors passed on, threads that end."""

import asyncio
import contextvars
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.exceptions import NotFittedError

from conftest import texture
from patchsvdd_fast import PatchLevel, PatchSVDD
from patchsvdd_fast.images.prepare import PreparedImage
from patchsvdd_fast.score.stream import Stream

LEVELS = (PatchLevel(64, 16), PatchLevel(32, 8))
MOST_AHEAD = 60
"""Items in all queues and hands together, generously."""


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(0.01)


def numbers(items, *, read=None, encode=None, search=None, on_error=None, shape=(3, 1, 1)):
    """A stream that returns its items, whole numbers, where nothing fails."""

    def reading(item, number):
        return PreparedImage(str(item if read is None else read(item)), torch.empty(shape), (1, 1))

    def encoding(images):
        return images, None if encode is None else encode(images)

    def searching(encoded):
        images, _ = encoded
        if search is not None:
            search(images)
        return [int(image.name) for image in images]

    return Stream(items, reading, encoding, searching, on_error)


def unreadable_when(is_bad, kind=ValueError):
    def read(item):
        if is_bad(item):
            raise kind(f"{item} is bad")
        return item

    return read


def in_a_moment(action, seconds=0.3):
    threading.Timer(seconds, action).start()


# --- order, and what cannot be read ---------------------------------------------------------------


def test_results_and_errors_come_in_the_order_of_the_items():
    def slow_for_some(item):
        time.sleep(0.005 * (item % 3))  # so that readers overtake each other
        return unreadable_when(lambda item: item % 7 in (2, 3) or item == 0)(item)

    events = []
    stream = numbers(
        range(60),
        read=slow_for_some,
        on_error=lambda item, error: events.append((item, str(error))),
    )
    for result in stream:
        events.append((result, None))
    bad = {item for item in range(60) if item % 7 in (2, 3) or item == 0}
    assert events == [(i, f"{i} is bad" if i in bad else None) for i in range(60)]


@pytest.mark.parametrize("items", [[], range(1), range(8), range(9), range(100)])
def test_streams_of_any_length_end(items):
    stream = numbers(items)
    assert list(stream) == list(items)
    assert list(stream) == []


def test_nothing_but_bad_items():
    failed = []
    stream = numbers(
        range(50),
        read=unreadable_when(lambda _: True, OSError),
        on_error=lambda item, _: failed.append(item),
    )
    assert list(stream) == []
    assert failed == list(range(50))


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError])
def test_without_on_error_the_first_bad_item_ends_the_stream(kind):
    stream = numbers(range(50), read=unreadable_when(lambda item: item == 20, kind))
    for expected in range(20):
        assert next(stream) == expected
    with pytest.raises(kind, match="20 is bad"):
        next(stream)
    assert list(stream) == []


def test_images_of_one_size_are_taken_together():
    sizes = []
    shapes = {0: (3, 2, 2), 1: (3, 2, 3)}

    def read(item, _):
        return PreparedImage(str(item), torch.empty(shapes[item // 3 % 2]), (1, 1))

    def encode(images):
        sizes.append({image.pixels.shape for image in images})
        return images, None

    stream = Stream(range(30), read, encode, lambda e: [int(image.name) for image in e[0]])
    assert list(stream) == list(range(30))
    assert all(len(shapes) == 1 for shapes in sizes)


@pytest.mark.parametrize(("side", "most"), [(16, 8), (256, 8), (300, 5), (600, 1), (2000, 1)])
def test_large_images_are_taken_in_small_numbers(side, most):
    """Else the maps of eight of them would take gigabytes."""
    counts = []
    everything_is_read = threading.Event()
    read = []

    def note(item):
        read.append(item)
        if len(read) >= 9:
            everything_is_read.set()
        return item

    def encode(images):
        everything_is_read.wait(10)  # so that the next batch is as large as it gets
        counts.append(len(images))

    pixels = torch.empty(1).expand(3, side, side)  # takes no memory
    stream = Stream(
        range(40),
        lambda item, _: PreparedImage(str(note(item)), pixels, (1, 1)),
        lambda images: (images, encode(images)),
        lambda encoded: [int(image.name) for image in encoded[0]],
    )
    assert list(stream) == list(range(40))
    assert max(counts) == most


# --- laziness, latency ----------------------------------------------------------------------------


def test_an_endless_source_is_read_a_little_ahead():
    latest = 0

    def endless():
        nonlocal latest
        while True:
            yield latest
            latest += 1

    with numbers(endless()) as stream:
        for result in stream:
            assert latest - result < MOST_AHEAD
            if result == 100:
                break
        time.sleep(0.3)  # what a slow caller does
        assert latest - 100 < MOST_AHEAD
    at_the_end = latest
    time.sleep(0.05)
    assert latest <= at_the_end + 1


def test_with_a_slow_source_results_come_at_once():
    taken = threading.Event()

    def source():
        for item in range(5):
            yield item
            assert taken.wait(10), "the result was kept back"
            taken.clear()

    found = []
    for result in numbers(source()):
        found.append(result)
        taken.set()
    assert found == list(range(5))


def test_a_bad_item_is_reported_at_once():
    taken = threading.Event()

    def source():
        for item in range(4):
            yield item
            assert taken.wait(10), "the error was kept back"
            taken.clear()

    def report(*_):
        taken.set()

    bad = unreadable_when(lambda _: True)
    assert list(numbers(source(), read=bad, on_error=report)) == []


def test_stages_overlap():
    """The caller is at item 0, search at 1 and encode at 2, and none goes on without the others."""
    together = threading.Barrier(3, timeout=10)
    next_item = threading.Semaphore(1)  # so that each is a batch of its own

    def source():
        for item in range(5):
            next_item.acquire()
            yield item

    def encode(images):
        next_item.release()
        if images[0].name == "2":
            together.wait()

    def search(images):
        if images[0].name == "1":
            together.wait()

    for result in numbers(source(), encode=encode, search=search):
        if result == 0:
            together.wait()
    assert not together.broken


# --- errors ---------------------------------------------------------------------------------------


class BrokenError(Exception):
    """No error that an image is expected to raise."""


@pytest.mark.parametrize("kind", [BrokenError, RuntimeError, MemoryError, ValueError])
def test_an_error_of_the_source_reaches_the_caller_after_all_results(kind):
    def source():
        yield from range(11)
        raise kind("no more")

    stream = numbers(source(), on_error=lambda *_: pytest.fail("it is no image's error"))
    found = []
    with pytest.raises(kind, match="no more"):
        for result in stream:
            found.append(result)
    assert found == list(range(11))
    assert list(stream) == []


@pytest.mark.parametrize("stage", ["read", "encode", "search"])
def test_an_error_in_a_stage_reaches_the_caller(stage):
    def fail_at_20(given):
        given_numbers = [given] if stage == "read" else [int(image.name) for image in given]
        if 20 in given_numbers:
            raise BrokenError(stage)
        return given

    on_error = lambda *_: pytest.fail("it is no image's error")  # noqa: E731
    stream = numbers(itertools.count(), on_error=on_error, **{stage: fail_at_20})
    found = []
    with pytest.raises(BrokenError, match=stage):
        for result in stream:
            found.append(result)
    assert found == list(range(len(found)))
    assert 20 - 8 < len(found) <= 20  # but for those that share a batch with it
    assert stage != "read" or len(found) == 20
    assert list(stream) == []


def test_an_error_in_on_error_ends_the_stream():
    def refuse(item, error):
        raise BrokenError from error

    stream = numbers(itertools.count(), read=unreadable_when(lambda i: i == 5), on_error=refuse)
    with pytest.raises(BrokenError):
        for _ in stream:
            pass
    assert list(stream) == []


# --- ends -----------------------------------------------------------------------------------------


def test_a_stream_that_is_forgotten_ends():
    def first_of():
        for result in numbers(itertools.count()):  # noqa: B007
            break
        return result

    assert first_of() == 0  # and the fixture finds no thread


def test_a_stream_that_is_never_used_ends():
    numbers(itertools.count())


def test_a_forgotten_stream_in_a_cycle_ends():
    holder = {"stream": numbers(itertools.count())}
    holder["holder"] = holder
    next(holder["stream"])


def test_a_closed_stream_has_nothing_more():
    stream = numbers(itertools.count())
    assert next(stream) == 0
    stream.close()
    stream.close()
    assert list(stream) == []


def test_a_stream_is_closed_while_its_source_is_waiting():
    never = threading.Event()

    def source():
        yield 1
        never.wait(10)

    with numbers(source()) as stream:
        assert next(stream) == 1
        started = time.monotonic()
    assert time.monotonic() - started < 2
    never.set()


def test_closing_from_another_thread_ends_the_wait():
    never = threading.Event()

    def source():
        never.wait(10)
        yield 1

    stream = numbers(source())
    in_a_moment(stream.close)
    assert list(stream) == []
    never.set()


def test_ctrl_c_reaches_a_waiting_caller():
    never = threading.Event()

    def source():
        yield 1
        never.wait(20)

    stream = numbers(source())
    assert next(stream) == 1
    in_a_moment(lambda: os.kill(os.getpid(), signal.SIGINT))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert time.monotonic() - started < 5
    assert list(stream) == []
    never.set()


# --- settings -------------------------------------------------------------------------------------


def test_stages_have_the_settings_of_where_the_stream_is_made():
    setting = contextvars.ContextVar("setting", default="default")
    found = set()
    setting.set("mine")
    stream = numbers(
        range(3),
        encode=lambda _: found.add(("encode", setting.get())),
        search=lambda _: found.add(("search", setting.get())),
    )
    setting.set("changed since")
    assert list(stream) == [0, 1, 2]
    assert found == {("encode", "mine"), ("search", "mine")}


# --- async ----------------------------------------------------------------------------------------


def test_async_results_and_errors_come_in_order():
    async def main():
        loop_thread, events = threading.get_ident(), []

        def note(item, error):
            assert threading.get_ident() == loop_thread
            events.append((item, str(error)))

        bad = unreadable_when(lambda item: item % 5 == 3)
        async for result in numbers(range(50), read=bad, on_error=note):
            events.append((result, None))
        return events

    expected = [(i, f"{i} is bad" if i % 5 == 3 else None) for i in range(50)]
    assert asyncio.run(main()) == expected


def test_other_tasks_go_on_while_a_stream_waits():
    async def main():
        released = threading.Event()

        def source():
            released.wait(10)
            yield 7

        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                if ticks == 20:
                    released.set()
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        found = [result async for result in numbers(source())]
        ticking.cancel()
        return found, ticks

    found, ticks = asyncio.run(main())
    assert found == [7]
    assert ticks >= 20


def test_timeouts_lose_no_result():
    async def main():
        def source():
            for item in range(30):
                time.sleep(0.002 * (item % 4))
                yield item

        found, timeouts = [], 0
        stream = numbers(source(), search=lambda _: time.sleep(0.001))
        for wait in itertools.cycle((0, 0.0001, 0.001, 0.003)):
            try:
                found.append(await asyncio.wait_for(stream.__anext__(), wait))
            except asyncio.TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                return found, timeouts

    found, timeouts = asyncio.run(main())
    assert found == list(range(30))
    assert timeouts > 0


def test_a_cancelled_task_leaves_the_stream_to_others():
    async def main():
        may_go_on = threading.Event()

        def source():
            yield 0
            may_go_on.wait(10)
            yield from (1, 2)

        stream = numbers(source())
        assert await anext(stream) == 0
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_go_on.set()
        return [result async for result in stream]

    assert asyncio.run(main()) == [1, 2]


@pytest.mark.parametrize("stage", ["source", "read", "encode", "search"])
def test_async_errors_reach_the_caller(stage):
    def fail(_):
        raise BrokenError(stage)

    async def main():
        items = map(fail, range(3)) if stage == "source" else range(3)
        stream = numbers(items, **({} if stage == "source" else {stage: fail}))
        with pytest.raises(BrokenError, match=stage):
            async for _ in stream:
                pass
        return [result async for result in stream]

    assert asyncio.run(main()) == []


def test_an_event_loop_ends_although_a_stream_waits():
    never = threading.Event()

    def source():
        yield 0
        never.wait(20)
        yield 1

    stream = numbers(source())

    async def main():
        assert await anext(stream) == 0
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05)

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 5
    never.set()
    assert list(stream) == [1]  # in no loop, or in another
    assert asyncio.run(anext_or_end(numbers([]))) == "the end"


async def anext_or_end(stream):
    return await anext(stream, "the end")


def test_closing_ends_an_async_wait():
    never = threading.Event()

    def source():
        never.wait(10)
        yield 1

    async def main():
        stream = numbers(source())
        asyncio.get_running_loop().call_later(0.05, stream.close)
        return [result async for result in stream]

    assert asyncio.run(main()) == []
    never.set()


# --- with a detector ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(texture(rng)).save(folder / f"{number}.png")
    detector = PatchSVDD(
        image_size=96, levels=LEVELS, embedding_dim=16, initialization="kaiming", device="cpu"
    )
    return detector.fit(folder, encoder=detector.untrained_encoder())


def test_scores_are_those_of_score(detector, tmp_path):
    rng = np.random.default_rng(1)
    pictures = [texture(rng, side=int(side)) for side in rng.integers(64, 130, 21)]
    for picture in pictures[::2]:
        picture[30:50, 20:40] = (250, 20, 20)
    items, good, names = [], [], []
    for number, picture in enumerate(pictures):
        path = tmp_path / f"{number}.png"
        Image.fromarray(picture).save(path)
        item = [path, str(path), picture, Image.fromarray(picture)][number % 4]
        names.append(str(path) if number % 4 < 2 else f"image {len(items)}")
        items.append(item)
        good.append(item)
        if number % 3 == 0:
            items.append(
                [tmp_path / "missing.png", 3.5, np.zeros((4, 4, 3), np.uint8), b""][number % 4]
            )
    expected = detector.score(good)
    failed = []
    results = list(
        detector.score_stream(items, on_error=lambda item, error: failed.append((item, error)))
    )
    assert [item for item, _ in failed] == [
        item for item in items if not any(item is g for g in good)
    ]
    assert {type(error) for _, error in failed} == {FileNotFoundError, TypeError, ValueError}
    assert len(results) == len(good)
    verdicts = detector.predict(good)
    p_values = detector.p_values(expected.image_scores)
    assert [result.name for result in results] == names
    for number, result in enumerate(results):
        assert result.score == float(expected.image_scores[number])
        assert torch.equal(result.anomaly_map, expected.anomaly_map[number])
        for name in ("level_maps", "distances", "bank_rows", "matches"):
            for level, values in getattr(expected, name).items():
                assert torch.equal(getattr(result.scores, name)[level][0], values[number])
        assert result.anomalous == (verdicts[number] == -1)
        assert result.p_value == p_values[number]
        assert result.picture.size == (96, 96)
        assert torch.isfinite(result.statistics).all()
    assert {result.anomalous for result in results} == {True, False}


def test_results_keep_images_as_they_were_if_asked(detector):
    wide = np.random.default_rng(5).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    with detector.score_stream([wide], keep_originals=True) as stream:
        (kept,) = stream
    with detector.score_stream([wide]) as stream:
        (plain,) = stream
    assert np.array_equal(kept.original, wide) and kept.original_picture is kept.original
    assert plain.original is None and plain.original_size == kept.original_size == (150, 300)
    assert plain.picture.size == (96, 96) and plain.original_picture.size == (96, 48)
    assert plain.score == kept.score


def test_a_false_alarm_rate_sets_the_threshold(detector):
    picture = texture(np.random.default_rng(2))
    (score,) = detector.score([picture]).image_scores.tolist()
    (result,) = detector.score_stream([picture], false_alarm_rate=0.5)
    assert result.anomalous == (score > detector.threshold(0.5))
    with pytest.raises(ValueError, match="at the lowest"):
        detector.score_stream([picture], false_alarm_rate=0.01)
    with pytest.raises(NotFittedError):
        PatchSVDD().score_stream([picture])


def test_images_of_any_size_in_one_stream(detector):
    free = PatchSVDD(
        image_size=None,
        mean="channel",
        levels=LEVELS,
        embedding_dim=16,
        initialization="kaiming",
        device="cpu",
    )
    rng = np.random.default_rng(3)
    free.fit([texture(rng) for _ in range(2)], encoder=detector.encoder_)
    pictures = [texture(rng, side) for side in (96, 96, 130, 64, 64, 97, 96)]
    for result, picture in zip(free.score_stream(pictures), pictures, strict=True):
        assert torch.equal(result.anomaly_map, free.score([picture]).anomaly_map[0])
        assert result.anomaly_map.shape == picture.shape[:2]
    # With a mean image there is one size only, and another is the image's error.
    failed = []
    fixed = free.set_params(mean="pixel")
    stream = fixed.score_stream(pictures, on_error=lambda _, error: failed.append(str(error)))
    assert len(list(stream)) == 3
    assert all("must have 96x96 pixels" in message for message in failed)


def test_a_stream_scores_with_the_detector_as_it_was(detector):
    picture = texture(np.random.default_rng(4))
    twin = detector.refit([texture(np.random.default_rng(s)) for s in (5, 6)])
    added = threading.Event()

    def source():
        yield picture
        added.wait(20)
        yield picture

    stream = twin.score_stream(source())
    before = next(stream)
    twin.add([picture])
    added.set()
    after = next(stream)
    assert after.score == before.score > 0
    assert (after.p_value, after.anomalous) == (before.p_value, before.anomalous)
    assert next(twin.score_stream([picture])).score == 0
    assert list(stream) == []


AT_EXIT = """
import asyncio, itertools, sys, threading, time
import numpy as np
from patchsvdd_fast import PatchSVDD

detector = PatchSVDD.load(sys.argv[1], device="cpu")
picture = np.random.default_rng(0).integers(256, size=(96, 96, 3), dtype=np.uint8)

def slow():
    yield picture
    time.sleep(1000)
    yield picture

async def first_of(stream):
    result = await anext(stream)
    try:
        await asyncio.wait_for(anext(stream), 0.2)
    except asyncio.TimeoutError:
        return result

waiting = detector.score_stream(slow())  # its source is waiting
asyncio.run(first_of(waiting))
never_used = detector.score_stream(itertools.repeat(picture))
working = detector.score_stream(itertools.repeat(picture))  # in native code
for result in working:
    break
print(result.score)
"""


def test_an_interpreter_exits_in_the_middle_of_streams(detector, tmp_path):
    detector.save(tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) > 0
