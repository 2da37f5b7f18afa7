"""Model files made by hand."""

import json

import safetensors.torch

from patchsvdd_fast.files import store

HUGE = 2**63 - 1
HEADER, CHECKSUMS = "patchsvdd_fast", "checksums"  # in the metadata


def packed(tensors, header, **changed):
    """A file's bytes with checksums that fit, whatever it holds; `changed` metadata, None: gone."""
    text = header if isinstance(header, str) else json.dumps(header)
    apart = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    sums = json.dumps(store._checksums(text, apart))
    metadata = {HEADER: text, CHECKSUMS: sums} | changed
    kept = {key: value for key, value in metadata.items() if value is not None}
    return safetensors.torch.save(apart, metadata=kept)
