"""The bank of normal embeddings and its exact search: on a CPU, on a GPU, or streamed to one."""
