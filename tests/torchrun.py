"""Processes that find each other as those that torchrun starts do, and what they write."""

import re
import socket
import subprocess

from conftest import script_environment
from processes import COMMAND


def started(commands, folders=None):
    """Processes of torchrun, one for each command; folders: that they work in."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    count = str(len(commands))
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "here"}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=script_environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)),
            cwd=folders and folders[rank],
        )
        for rank, command in enumerate(commands)
    ]


def ended(processes):
    """Each with its status, and what it has printed."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def together(count, *command):
    return ended(started([[*COMMAND, *command]] * count))


def files_of(folder):
    return {
        str(path.relative_to(folder)): re.sub(rb"\d\d:\d\d [A-Z]+", b"", path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".patchsvdd-run")
    }
