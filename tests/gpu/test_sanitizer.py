"""Runs the small GPU tests under compute-sanitizer: memory accesses, races in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120  # seconds per tool
FAILURE = 86  # exit status by which the tool reports what it found


def find_sanitizer():
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    folders = [f"{place}/{part}" for place in places for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))


def sanitize(sanitizer, tool, *arguments):
    """Run Python under a tool that looks at this library's kernels alone."""
    command = [
        *(sanitizer, "--tool", tool, "--kernel-name", "kns=psvdd"),
        *("--error-exitcode", str(FAILURE), sys.executable, *arguments),
    ]
    # Every tensor gets memory of its own, so that an access beyond its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{tool} did not end within {TIMEOUT} s")
    return done.returncode, done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_complaints_of(tool, device):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    program = f"import torch; print(torch.ones(2, device={str(device)!r}).sum().item())"
    status, output = sanitize(sanitizer, tool, "-c", program)
    if status != 0 or "2.0" not in output:
        pytest.skip(f"compute-sanitizer does not start here: {output[-300:]}")
    status, output = sanitize(
        *(sanitizer, tool, "-m", "pytest", "tests/gpu", "-x", "-p", "no:cacheprovider"),
        *("-k", "small"),
        *("--gpu-device", str(device)),
    )
    assert status == 0, output[-6000:]
    assert " passed" in output
