"""Self-supervised training of the Patch SVDD encoder."""
