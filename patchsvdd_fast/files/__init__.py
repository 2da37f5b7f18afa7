"""Files and folders: whole writes, the format of models, where images lie."""
