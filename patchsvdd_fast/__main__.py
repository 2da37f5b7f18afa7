"""`python -m patchsvdd_fast` is the `patchsvdd` command."""

from .cli.app import main

if __name__ == "__main__":
    main()
