"""The commands of `patchsvdd`, one module for each kind; `app` puts them together."""
