"""The `patchsvdd` command, also as `python -m patchsvdd_fast`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C prints "interrupted", even while modules are being loaded."""
    try:
        from .cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # by the shell's convention
    run()


if __name__ == "__main__":
    main()
