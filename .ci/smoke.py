"""Tries an installed wheel: searches find what float64 finds, to the same bits in every way."""

import numpy as np

from patchsvdd_fast import ops
from patchsvdd_fast.score import NormalBank, nearest

QUERIES, BANK, DIMS = 100, 3000, 64

rng = np.random.default_rng(0)
# As trained encoders leave them: a tiny ball far from the origin.
centre = rng.normal(0, 0.4, DIMS)
queries, bank = (
    (centre + rng.normal(0, 0.005, (rows, DIMS))).astype(np.float32) for rows in (QUERIES, BANK)
)
differences = queries[:, None].astype(np.float64) - bank[None].astype(np.float64)
true = np.sqrt((differences**2).sum(2))  # [QUERIES, BANK]

first = None
for name in ops.instruction_sets():
    with ops.use_instruction_set(name):
        for search in (lambda: nearest(queries, bank), lambda: NormalBank(bank).nearest(queries)):
            distances, rows = (np.asarray(result) for result in search())
            first = first or (distances, rows)
            assert np.array_equal(distances, first[0]) and np.array_equal(rows, first[1]), name
            np.testing.assert_allclose(distances, true.min(1), rtol=1e-6)
            np.testing.assert_allclose(true[np.arange(QUERIES), rows], true.min(1), rtol=1e-6)
print(f"{QUERIES} queries, bank {BANK} x {DIMS}: right, to the bit:", *ops.instruction_sets())
