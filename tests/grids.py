"""Awkward patch grids that several tests share: size, stride, height, width in pixels."""

GRIDS = [
    (1, 1, 1, 1),
    (3, 1, 7, 9),
    (16, 5, 50, 61),
    (32, 4, 64, 36),
    (7, 7, 30, 31),
    (5, 3, 5, 11),
]
