"""Ops as PyTorch sees them: opcheck, compilation, builds without CUDA."""

from pathlib import Path

import pytest
import torch

from patchsvdd_fast import ops
from patchsvdd_fast.ops import _native, backends


def test_a_build_without_cuda_says_how_to_rebuild(monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    elsewhere = torch.empty(1, device="meta")
    with pytest.raises(RuntimeError, match="PATCHSVDD_CUDA=ON"), backends.backend_of(elsewhere):
        pass


OPCHECKS = [
    (torch.ops.patchsvdd_fast.extract_patches, (torch.rand(2, 3, 20, 21).requires_grad_(), 6, 3)),
    (
        torch.ops.patchsvdd_fast.extract_patches,
        (torch.ones(2, 3, 20, 21, dtype=torch.uint8), 6, 3, torch.rand(3, 20, 21)),
    ),
    (
        torch.ops.patchsvdd_fast.extract_patches_backward,
        (torch.rand(2, 5, 6, 3, 6, 6), 3, 20, 21),
    ),
    (torch.ops.patchsvdd_fast.score_map, (torch.rand(2, 5, 6), 6, 3, 20, 21)),
    (torch.ops.patchsvdd_fast.nearest, (torch.rand(5, 7), torch.rand(11, 7))),
    (
        torch.ops.patchsvdd_fast.crop_pairs,
        (
            torch.ones(2, 3, 40, 50, dtype=torch.uint8),
            *(torch.rand(3, 40, 50), torch.tensor([1, 0, 1]), 32, "neighbour", 5, 6),
        ),
    ),
    (
        torch.ops.patchsvdd_fast.crop_pairs,
        (
            torch.ones(2, 3, 40, 50, dtype=torch.uint8),
            *(torch.rand(3, 40, 50), torch.tensor([1, 0, 1]), 6, "view", 5, 6, False, 7),
        ),
    ),
]


@pytest.mark.parametrize(("op", "arguments"), OPCHECKS)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_compiles_to_a_full_graph():
    def whole_path(images, mean, bank):
        patches = ops.extract_patches(images, 8, 4, mean)
        distances, _ = ops.nearest(patches.flatten(3).flatten(0, 2), bank)
        return ops.score_map(distances.view(patches.shape[:3]), 8, 4, *images.shape[-2:])

    arguments = (
        torch.randint(256, (2, 3, 24, 28), dtype=torch.uint8),
        torch.rand(3, 24, 28) * 255,
        torch.rand(50, 3 * 8 * 8),
    )
    compiled = torch.compile(whole_path, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), whole_path(*arguments))


def test_tiles_are_used_only_where_the_processor_has_them():
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else ()
    sets = ops.instruction_sets()
    if "amx" in sets:
        assert {"amx_tile", "amx_int8", "avx512_vnni"} <= flags
        assert sets.index("amx") < sets.index("avx512")
    else:
        refused = pytest.raises(ValueError, match="does not support the instruction set amx")
        with refused, ops.use_instruction_set("amx"):
            pass
