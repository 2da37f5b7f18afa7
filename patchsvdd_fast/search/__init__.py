"""The memory bank and its exact search: clustered or not, on the CPU, a GPU or streamed to one."""
