"""Awkward patch grids and pairs of patches that several tests share."""

# size, stride, height, width in pixels
GRIDS = [
    (1, 1, 1, 1),
    (3, 1, 7, 9),
    (16, 5, 50, 61),
    (32, 4, 64, 36),
    (7, 7, 30, 31),
    (5, 3, 5, 11),
]

# kind, size, channels, height, width in pixels, redraw_clipped
PAIRS = [
    ("position", 4, 1, 4, 4, False),
    ("position", 5, 2, 9, 30, True),
    ("position", 32, 3, 70, 33, False),
    ("position", 43, 5, 85, 90, True),
    ("position", 64, 3, 150, 200, False),
    ("neighbour", 32, 3, 32, 40, False),
    ("neighbour", 35, 2, 90, 35, True),
    ("neighbour", 64, 3, 256, 200, False),
    ("neighbour", 128, 1, 140, 131, False),
    ("view", 1, 3, 1, 1, False),
    ("view", 7, 2, 20, 9, True),
    ("view", 64, 3, 100, 150, False),
]
