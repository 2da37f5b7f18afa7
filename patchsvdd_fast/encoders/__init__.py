"""Encoders of patches, the patch grids they are used on, and the precision they compute in."""
