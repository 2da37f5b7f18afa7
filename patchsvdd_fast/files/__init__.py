"""Files and folders: atomic writes, the format of model files, finding images."""
