"""The server of docs/serving.md under load, beside the detector alone in the same process.

    PYTHONPATH=. python benchmarks/serving.py [--requests 96]

Images are PNGs of 256x256 pixels of the built-in sample of cloth; the encoder is an untrained one
of Patch SVDD with its two levels, the banks hold 20 images. Client and server share the process,
its cores and Python's lock. A row is so many clients, each of which asks again once it has its
answer; `score` is the peer: decoded images, one after another, without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn

from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.images.prepare import read_image
from patchsvdd_fast.images.sample_cloth import write_sample_category

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
CLIENTS = (1, 4, 16)


async def ask(address: str, files: Sequence[bytes], clients: int) -> list[float]:
    """Post each file once; the seconds that each answer took."""
    left, seconds = iter(files), []

    async def ask_on(client: httpx.AsyncClient) -> None:
        for file in left:
            started = time.perf_counter()
            (await client.post("/score", content=file)).raise_for_status()
            seconds.append(time.perf_counter() - started)

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
    return seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    count = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as folder:
        write_sample_category(Path(folder))
        category = Path(folder) / "cloth"
        detector = PatchSVDD(device="cpu")
        detector.fit(category, encoder=detector.untrained_encoder())
        os.environ["MODEL"] = f"{folder}/model.safetensors"
        detector.save(os.environ["MODEL"])
        paths = sorted(category.glob("test/good/*.png"))
        files = [paths[i % len(paths)].read_bytes() for i in range(count)]
        images = [read_image(path) for path in paths]
        namespace: dict[str, Any] = {}
        code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
        exec(compile(code, "serve.py", "exec"), namespace)
        server = uvicorn.Server(uvicorn.Config(namespace["app"], port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        asyncio.run(ask(address, files[:8], 4))
        print(f"{count} images, {torch.get_num_threads()} threads")
        print("| clients | images a second | median ms | 95 % ms |\n|---|---|---|---|")
        for clients in CLIENTS:
            started = time.perf_counter()
            seconds = asyncio.run(ask(address, files, clients))
            rate = count / (time.perf_counter() - started)
            median, high = np.percentile(seconds, [50, 95]) * 1000
            print(f"| {clients} | {rate:.1f} | {median:.0f} | {high:.0f} |", flush=True)
        server.should_exit = True
        thread.join()
        started = time.perf_counter()
        for i in range(count):
            detector.score([images[i % len(images)]])
        print(f"| `score` | {count / (time.perf_counter() - started):.1f} | | |")


if __name__ == "__main__":
    main()
