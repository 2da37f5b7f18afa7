"""What embeds patches: the encoders, the grids they are used on, the arithmetic they run in."""
