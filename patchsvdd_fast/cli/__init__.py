"""The commands of `patchsvdd`, one module for each kind; `cli` puts them together."""
