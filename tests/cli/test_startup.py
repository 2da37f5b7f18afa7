"""Start of the command line: help without PyTorch, Ctrl-C without a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, script_environment
from processes import COMMAND

COMMANDS = ("train", "score", "watch", "evaluate", "explain", "update", "info", "export", "demo")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_answered_without_pytorch(command):
    code = (
        "import sys; from patchsvdd_fast.__main__ import main\n"
        f"sys.argv = ['patchsvdd', *{command!r}, '--help']\n"
        "try: main()\n"
        "except SystemExit as end: print(f'status {end.code}')\n"
        "slow = {'torch', 'numpy', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "print(f'slow {sorted(slow)}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=script_environment(),
    )
    assert "Usage: patchsvdd" in done.stdout
    assert "status 0" in done.stdout
    assert "slow []" in done.stdout


@pytest.mark.parametrize("command", [("info",), ("score", "model", "image"), ("demo",)])
def test_interrupted_while_pytorch_is_imported(command, tmp_path):
    """Whatever the library that is being imported makes of it."""
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('broken library') from error\n"
    )
    process = subprocess.Popen(
        [*COMMAND, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (output, errors) == ("", "interrupted\n")
