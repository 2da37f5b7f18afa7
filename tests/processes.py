"""Commands and scripts in processes of their own, how they end, their limits; and a clock."""

import functools
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import script_environment

COMMAND = [sys.executable, "-m", "patchsvdd_fast"]


def run_script(*command, **options):
    """A Python script and its arguments, to the end, on one thread."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=script_environment(OMP_NUM_THREADS="1"),
        **options,
    )


def one_line_error(done):
    """The message of a failed command, which must be one line and no traceback."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def ended(process):
    """Its output and errors; its standard input stays open until it has ended by itself."""
    process.wait(timeout=60)
    with process.stdout, process.stderr:
        return process.stdout.read(), process.stderr.read()


def status(field):
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def largest_file(size):
    """Within the context no file grows beyond this many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@functools.cache
def openvino():
    """The module, whose `Core` is made once and kept; skips the test where it is missing.

    An engine of OpenVINO gives the thread that makes it a stack for handlers of signals, and unmaps
    it wherever its last reference ends: in another thread, the first one's next signal would be the
    end of the process.
    """
    module = pytest.importorskip("openvino", reason="needs openvino")
    module.Core = functools.cache(module.Core)
    return module


class Clock:
    """Stands for the module `time`; goes on only when told."""

    def __init__(self, now):
        self.now = now

    def perf_counter(self):
        return self.now
