"""Start of the command line: help without PyTorch, Ctrl-C without a traceback."""

import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
import typer
from typer.testing import CliRunner

import patchsvdd_fast
from conftest import ROOT, script_environment
from patchsvdd_fast.cli.app import app
from patchsvdd_fast.encoders.backbone import PROJECTIONS
from patchsvdd_fast.encoders.patch_svdd import INITIALIZATIONS
from patchsvdd_fast.encoders.precision import PRECISIONS
from patchsvdd_fast.images.light import ILLUMINATIONS, MEANS
from patchsvdd_fast.report.map_files import MAP_FORMATS
from patchsvdd_fast.report.table import TABLE_FORMATS
from patchsvdd_fast.training.settings import MODES, SURFACES
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


def importing_pytorch(command, folder, **options):
    """A process of the command that has begun to import PyTorch, which takes a minute there."""
    (folder / "torch.py").write_text(
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
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        **options,
    )
    assert process.stdout.readline() == "importing\n"
    return process


@pytest.mark.parametrize("command", [("info",), ("score", "model", "image"), ("demo",)])
def test_interrupted_while_pytorch_is_imported(command, tmp_path):
    """Whatever the library that is being imported makes of it."""
    process = importing_pytorch(command, tmp_path)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (output, errors) == ("", "interrupted\n")


def test_a_background_job_goes_on_after_ctrl_c(tmp_path):
    """A shell starts it with SIGINT ignored."""
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    process = importing_pytorch(("info",), tmp_path, preexec_fn=ignore)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    process.communicate()


def test_without_a_command_there_is_the_help_and_no_error():
    done = subprocess.run(
        COMMAND, capture_output=True, text=True, check=False, env=script_environment()
    )
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert "patchsvdd" in done.stdout
    assert "error" not in done.stderr


def test_version():
    done = subprocess.run(
        [*COMMAND, "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=script_environment(),
    )
    assert done.stdout == f"patchsvdd_fast {patchsvdd_fast.__version__}\n"


def test_help_names_every_option_whole_at_80_columns():
    """Also the choices of each, unless they are wider than the column."""
    for command in typer.main.get_command(app).commands.values():
        done = CliRunner().invoke(app, [command.name, "--help"], env={"COLUMNS": "80"})
        for option in command.params:
            for name in [*option.opts, *option.secondary_opts]:
                if name.startswith("-"):
                    assert re.search(rf"{name}[ ,\n]", done.output), name
        assert max(map(len, done.output.splitlines())) <= 80


def test_choices_are_those_of_the_library():
    choices = {
        "--format": TABLE_FORMATS,
        "--maps": MAP_FORMATS,
        "--mode": MODES,
        "--surface": SURFACES,
        "--initialization": INITIALIZATIONS,
        "--precision": PRECISIONS,
        "--encoding-precision": PRECISIONS,
        "--illumination": ILLUMINATIONS,
        "--mean": MEANS,
        "--projection": PROJECTIONS,
    }
    for command in typer.main.get_command(app).commands.values():
        for option in command.params:
            wanted = choices.get(option.opts[0])
            if wanted is not None:
                shown = set(option.metavar.strip("[]").split("|")) - {"auto"}
                assert shown == set(wanted), (command.name, option.opts)


def test_a_wrong_choice_is_told_before_a_model_is_opened():
    for arguments in (
        ("score", "missing", "x", "--format", "xml"),
        ("train", "missing", "--mean", "median"),
        ("train", "missing", "--device", "cuda:x"),
        ("score", "missing", "x", "--false-alarm-rate", "1.5"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert "missing" not in done.output
