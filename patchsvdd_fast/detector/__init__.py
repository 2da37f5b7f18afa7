"""The detector: fit on good images, score new ones, save, load, change, evaluate, export."""
