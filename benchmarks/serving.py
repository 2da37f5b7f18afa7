"""The server of docs/serving.md under load, beside the detector alone in the same process.

    python benchmarks/serving.py --output benchmarks/results

Images are PNGs of 256x256 pixels of the built-in sample of cloth; the encoder is an untrained one
of Patch SVDD with its two levels, the banks hold 20 images. Client and server share the process,
its cores and Python's lock. A row is so many clients, each of which asks again once it has its
answer; `score` is the peer: decoded images, one after another, without a server. All take turns;
the rates are medians of the turns, the times of an answer those of all turns together. Writes
serving.json and serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import blas
import httpx
import numpy as np
import torch
import uvicorn

from common import origin, write_results
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.images.prepare import read_image
from patchsvdd_fast.images.sample_cloth import write_sample_category

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
CLIENTS = (1, 4, 16)
QUICK = {"levels": [(64, 16), (32, 8)], "image_size": 96}  # of the detector, to try the script
WARM_UP = 8  # requests


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


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of the page's server, in a thread, of the model that MODEL names."""
    namespace: dict[str, Any] = {}
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    exec(compile(code, "serve.py", "exec"), namespace)
    server = uvicorn.Server(uvicorn.Config(namespace["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def measure(folder: Path, requests: int, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A record for each number of clients, and one of the detector alone."""
    write_sample_category(folder)
    category = folder / "cloth"
    detector = PatchSVDD(device="cpu", **(QUICK if quick else {}))
    detector.fit(category, encoder=detector.untrained_encoder())
    os.environ["MODEL"] = str(folder / "model.safetensors")
    detector.save(os.environ["MODEL"])
    paths = sorted(category.glob("test/good/*.png"))
    files = [paths[i % len(paths)].read_bytes() for i in range(requests)]
    images = [read_image(path) for path in paths]
    rates: dict[int, list[float]] = {clients: [] for clients in (0, *CLIENTS)}
    answers: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    with serving() as address:
        asyncio.run(ask(address, files[:WARM_UP], 4))
        for _ in range(repeats):
            for clients in CLIENTS:
                started = time.perf_counter()
                answers[clients] += asyncio.run(ask(address, files, clients))
                rates[clients].append(requests / (time.perf_counter() - started))
            started = time.perf_counter()
            for i in range(requests):
                detector.score([images[i % len(images)]])
            rates[0].append(requests / (time.perf_counter() - started))
    alone = statistics.median(rates[0])
    records: list[dict[str, Any]] = []
    for clients, found in rates.items():
        rate = statistics.median(found)
        record = {"clients": clients, "images_per_second": rate, "of_score": rate / alone}
        record["all_images_per_second"] = found
        if clients:
            median, high = np.percentile(answers[clients], [50, 95]) * 1000
            record |= {"median_milliseconds": median, "milliseconds_of_95_percent": high}
        records.append(record)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per number of clients, the detector alone last."""
    lines = [
        "| clients at once | images a second | of `score` alone | median answer | 95 % within |",
        "|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda one: one["clients"] or np.inf):
        name = record["clients"] or "(`score`, no server)"
        times = ("median_milliseconds", "milliseconds_of_95_percent")
        cells = [f"{record[time]:,.0f} ms" if time in record else "" for time in times]
        rates = f"{record['images_per_second']:.3g} | {record['of_score']:.2f}"
        lines.append(f"| {name} | {rates} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for serving.json and .md")
    parser.add_argument("--requests", type=int, default=96, help="images in each turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = measure(Path(folder), options.requests, options.repeats, options.quick)
    workload = {
        "requests": options.requests,
        "repeats": options.repeats,
        "quick": options.quick,
        "threads": torch.get_num_threads(),
    }
    result = {**origin(), "workload": workload, "records": records}
    print(table(records))
    if options.output:
        write_results(options.output, "serving", result, table(records))


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
