"""The server and the camera of docs/serving.md, with a real client and a real video."""

import asyncio
import base64
import contextlib
import gc
import io
import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, texture
from patchsvdd_fast import PatchSVDD

SIDE, SECONDS = 128, 60
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SERVER, CAMERA = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(SHOWN,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def spotted(image):
    image[40:60, 60:90] = 85, 77, 68
    return image


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [texture(rng, SIDE) for _ in range(12)]


@pytest.fixture
def model(tmp_path, images):
    """The path of a model, in the folder where the pages' code runs."""
    detector = PatchSVDD(levels=[(64, 16), (32, 8)], image_size=SIDE, device="cpu")
    detector.fit(images[:9], encoder=detector.untrained_encoder())
    detector.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def as_file(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@contextlib.contextmanager
def running(namespace):
    """The address of a server of the page's `app`, in a thread."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn")
    server = uvicorn.Server(uvicorn.Config(namespace["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not server.started:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


class EndsEarly:
    """A request whose client goes away while it sends."""

    async def stream(self):
        from starlette.requests import ClientDisconnect

        yield b"half"
        raise ClientDisconnect


def test_the_server_answers(model, images, monkeypatch, caplog):
    fastapi = pytest.importorskip("fastapi", reason="needs fastapi")
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    monkeypatch.setenv("MODEL", str(model))
    namespace = {}
    exec(compile(SERVER, "serve.py", "exec"), namespace)
    given = [*images[9:], spotted(images[0].copy())]
    expected = PatchSVDD.load(model, "cpu").score(np.stack(given)).image_scores

    async def ask_all(address):
        async with httpx.AsyncClient(base_url=address, timeout=SECONDS) as client:
            asked = [client.post("/score", content=as_file(image)) for image in given * 3]
            return [answer.json() for answer in await asyncio.gather(*asked)]

    with running(namespace) as address, httpx.Client(base_url=address, timeout=SECONDS) as client:
        found = asyncio.run(ask_all(address))
        scores = torch.tensor([answer["score"] for answer in found])
        torch.testing.assert_close(scores, expected.repeat(3), rtol=1e-4, atol=0)
        assert [answer["anomalous"] for answer in found] == [False, False, False, True] * 3
        assert found[3]["regions"]
        answer = client.post("/score?overlay=true", content=as_file(given[-1], "BMP")).json()
        overlay = Image.open(io.BytesIO(base64.b64decode(answer["overlay"])))
        assert overlay.size == (SIDE, SIDE)

        def status(content):
            return client.post("/score", content=content).status_code

        assert status(b"no image") == status(b"") == status(as_file(given[0])[:900]) == 415
        assert status(as_file(given[0][:20, :20])) == 422
        monkeypatch.setitem(namespace, "MOST_PIXELS", 99)
        assert status(as_file(given[0])) == 413
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
        assert status(as_file(given[0])) == 413
        monkeypatch.setitem(namespace, "MOST_BYTES", 99)
        assert status(iter([b"no image"] * 99)) == 413
        monkeypatch.undo()
        inbox = namespace["app"].state.scorer.inbox
        monkeypatch.setattr(inbox, "maxsize", 1)
        monkeypatch.setattr(inbox, "_qsize", lambda: 1)
        assert status(as_file(given[0])) == 503
        monkeypatch.undo()
        with pytest.raises(fastapi.HTTPException, match="400: the upload ended early"):
            asyncio.run(namespace["score"](EndsEarly()))
        assert status(as_file(given[0])) == 200
        with model.open("r+b") as file:
            file.write(bytes(1))
        assert [status(as_file(given[0])) for _ in range(2)] == [503, 503]
    namespace.clear()
    gc.collect()  # where asyncio would log a task whose error nobody saw
    (logged,) = caplog.records
    assert logged.getMessage() == "scoring has ended"
    assert isinstance(logged.exc_info[1], OSError)


def test_a_video_is_scored(model, images, monkeypatch, capsys):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    monkeypatch.chdir(model.parent)
    kind = cv2.VideoWriter_fourcc(*"HFYU")  # lossless
    video = cv2.VideoWriter("frames.avi", kind, 5, (SIDE, SIDE))
    if not video.isOpened():
        pytest.skip("OpenCV has no lossless video here")
    for image in (images[9], spotted(images[10].copy()), images[11]):
        video.write(np.ascontiguousarray(image[:, :, ::-1]))
    video.release()
    exec(compile(CAMERA, "camera.py", "exec"), {})
    assert capsys.readouterr().out == SHOWN
    (model.parent / "frames.avi").unlink()
    with pytest.raises(SystemExit, match="the video cannot be opened"):
        exec(compile(CAMERA, "camera.py", "exec"), {})
