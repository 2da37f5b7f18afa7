"""Images: read, lit alike, described, kept as pictures, and made up for demos and checks."""
