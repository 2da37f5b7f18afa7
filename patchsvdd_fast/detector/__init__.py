"""The detector: fit it on good images, score new ones; save, load, update, evaluate, export."""
