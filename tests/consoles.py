"""The consoles of the documentation: their commands are run, and what they print is compared."""

from __future__ import annotations

import _thread
import contextlib
import io
import re
import shlex
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from patchsvdd_fast.cli import app as cli

LONGEST_WAIT = 30  # seconds, for what is to be there before Ctrl-C

# Marks on a page that are not printed: lines left out (or none), words left out, Ctrl-C.
LEFT_OUT = {"...\n": r"(?:.*?\n)??", "...": ".*?", "^C": ""}
MARKS = re.compile(r"(^\.{3}\n|\.{3}|\^C)", re.MULTILINE)

# What differs from machine to machine and from run to run.
THREADS = r"(?<=on )\d+ threads?(?=,)"
TOLD = r"[^\n]*(?:\n {17}[^\n]*)*"  # what a row of `patchsvdd info` says, over several lines
NUMBER = r"(?<![\da-wyz_])-?\d+(?:(?:[.,:]|e[+-]?)\d+)*(?:\+(?:cpu|cu\d+))?"  # not that of lite0
FILL = "(?: +|[─━]+)"  # of the columns of a table
MACHINE = rf"(?P<row>^ (?:system|CPU search|CUDA kernels|GPU) ){TOLD}"
VARIES = re.compile(f"{MACHINE}|(?P<threads>{THREADS})|(?P<number>{NUMBER})|{FILL}", re.MULTILINE)


def looks_like(shown, printed, any_numbers=False):
    """Whether it is what a page shows: "..." stands for anything, alone in a line for lines.

    any_numbers: whether a number on the page stands for any number: 1,204 for -6e-08."""
    return _matched(shown, printed, any_numbers) is not None


def shown_anew(shown, printed):
    """What a page is to show, with the numbers that were printed; what it leaves out stays out."""
    found = iter(_matched(shown, printed, any_numbers=True).groups())
    renewed = "".join(part if part in LEFT_OUT else next(found) for part in _parts(shown))
    return renewed and renewed + "\n"


def _matched(shown, printed, any_numbers):
    """The match of all that is printed; its groups are the parts that the page shows."""
    pattern = _with_any_numbers if any_numbers else re.escape
    parts = (LEFT_OUT.get(part, f"({pattern(part)})") for part in _parts(shown))
    return re.fullmatch("".join(parts), _trimmed(printed), re.DOTALL)


def _parts(shown):
    """What a page shows, divided at what it leaves out."""
    return MARKS.split(_trimmed(shown))


def _with_any_numbers(text):
    """The pattern of a text in which numbers, and what a machine has, may be others."""
    pattern, end = "", 0
    for found in VARIES.finditer(text):
        pattern += re.escape(text[end : found.start()])
        if found["row"]:
            pattern += found["row"] + TOLD
        elif found["threads"]:
            pattern += r"\d+ threads?"
        else:
            pattern += NUMBER if found["number"] else FILL
        end = found.end()
    return pattern + re.escape(text[end:])


def _trimmed(text):
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


class Shell:
    """Runs the lines of a console; `patchsvdd` in this process, which has PyTorch loaded."""

    status = 0

    def run(self, command, shown):
        """Returns what the command prints; `shown` may hold "^C" where it is interrupted."""
        if command == "echo $?":
            status, self.status = self.status, 0
            return f"{status}\n"
        assert self.status == 0, f"exit status {self.status} before: {command}"
        *before, last = command.split(" | ")
        if not last.startswith("patchsvdd "):
            return _bash(command)
        output = io.StringIO()
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(sys, "argv", shlex.split(last))
            given = _bash(before[0]) if before else ""
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
            patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
            if "^C" in shown:
                ended = threading.Event()
                stack.callback(ended.set)
                arguments = shown.partition("^C")[0], output, ended
                threading.Thread(target=_interrupt_after, args=arguments, daemon=True).start()
            exits = stack.enter_context(pytest.raises(SystemExit))
            cli.main()
        self.status = exits.value.code
        return output.getvalue()


def _bash(command):
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True
    ).stdout


def _interrupt_after(shown, output, ended):
    deadline = time.monotonic() + LONGEST_WAIT
    while not ended.wait(0.05):
        if looks_like(shown, output.getvalue(), True) or time.monotonic() > deadline:
            _thread.interrupt_main()
            break


def run_console(shell, block):
    """Run the commands of a block and compare; returns the block with the numbers printed now."""
    renewed = ""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        printed = shell.run(command, shown)
        any_numbers = command != "echo $?"
        same = looks_like(shown, printed, any_numbers)
        assert same, f"$ {command}\n{printed}\nis not\n{shown}"
        renewed += f"$ {command}\n{shown_anew(shown, printed)}"
    return renewed
