"""`python -m patchsvdd_fast` is the `patchsvdd` command."""

from .cli import main

if __name__ == "__main__":
    main()
