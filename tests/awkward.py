"""Embeddings that rounding, ties or pruning may stumble on."""

import torch

KINDS = [
    *(
        "normal",
        "equal",
        "duplicates",
        "one ulp",
        "far ball",
        "subnormal",
        "squares underflow",
        "mixed scales",
    ),
    *("two blobs", "outlier", "simplex", "lattice"),
]


def awkward(kind, rows, dim, generator):
    """Embeddings [rows, dim] of a kind that rounding, ties or pruning may stumble on."""
    normal = torch.randn(rows, dim, generator=generator)
    copies = torch.randint(max(1, rows // 4), (rows,), generator=generator)
    higher = torch.nextafter(normal[copies], torch.full((), torch.inf))
    some = torch.rand(rows, dim, generator=generator) < 0.1
    number = torch.arange(rows)
    return {
        "normal": normal,
        "equal": normal[:1].expand(rows, dim).contiguous(),
        "duplicates": normal[copies],
        "one ulp": torch.where(some, higher, normal[copies]),
        "far ball": 1.0 + 1e-6 * normal,  # norm over spread: a million
        "subnormal": normal * 1e-41,
        "squares underflow": normal * 1e-22,
        "mixed scales": normal * 10.0 ** torch.randint(-8, 8, (rows, 1), generator=generator),
        "two blobs": normal + 1e4 * (number[:, None] % 2),
        "outlier": torch.where(number[:, None] == rows // 2, torch.tensor(1e6), normal),
        "simplex": torch.eye(dim)[number % dim],  # all at one distance, as far as D allows
        "lattice": torch.randint(-2, 3, (rows, dim), generator=generator).float(),
    }[kind]
