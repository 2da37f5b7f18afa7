"""The `patchsvdd` command: puts the commands together, shows errors and sets the exit status.

Neither this module nor those of the commands import PyTorch: the commands' functions do, so that
--help and wrong usage are answered at once.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer
from PIL import Image

from . import demo, evaluate, model, score, train, update
from .options import INTERRUPTED, TERMINATED
from .terminal import console, errors, print_error, print_warning

_DIVIDED = (
    "train",
    "score",
    "evaluate",
    "update",
)  # commands whose work several processes can divide
_USUAL_LIMIT = f"{Image.MAX_IMAGE_PIXELS:,} pixels"  # Pillow's own, which --max-pixels changes

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,  # its tables break the names of options; without, help is faster, too
    pretty_exceptions_enable=False,
)
for command in (
    train.train,
    score.score,
    score.watch,
    evaluate.evaluate,
    model.explain,
    update.update,
    model.info,
    model.export,
    demo.demo,
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        console.print(f"patchsvdd_fast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def limits(
    context: typer.Context,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Refuse images of more pixels than this, since a small file may decompress to "
            "gigabytes; 0: no limit.",
            min=0,
            show_default=_USUAL_LIMIT,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Patch SVDD anomaly detection with exact nearest-neighbour search."""
    if context.invoked_subcommand is None:
        console.print(context.get_help(), highlight=False)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in _DIVIDED:
        raise ValueError(f"`{context.invoked_subcommand}` is one process: run it without torchrun")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # they are refused
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels or None


def main() -> None:
    """Run the command line: errors are one line, status 1; 2 is wrong usage, 130 Ctrl-C."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)  # Typer turns Ctrl-C into an exit status or an Abort
    except typer.Abort:
        status = INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        _fail(str(error) or type(error).__name__, status=1)
    except Exception as error:
        # Usage errors of Typer have format_message; everything else is a bug.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), status=2)
    if status == INTERRUPTED:
        errors.print("[bold red]interrupted[/]", markup=True)
    if status == TERMINATED:
        errors.print("[bold red]terminated[/]", markup=True)
    sys.exit(status or 0)


def _fail(message: str, status: int) -> None:
    if message:  # none after the help that a command without arguments gives
        print_error(message)
    sys.exit(status)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print_warning(str(message))
