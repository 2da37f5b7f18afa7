"""The native operations as torch ops, and the settings of searches.

Every op validates, allocates its results with torch, and hands raw pointers to the extension. The
backend follows the device of the input: CPU kernels on `torch.get_num_threads()` threads, CUDA
kernels on the current stream.
"""

from .backends import instruction_sets, use_instruction_set, use_method, use_workspace_limit
from .patches import crop_pairs, extract_patches, score_map
from .search import (
    SEGMENT_ROWS,
    encode_segments,
    nearest,
    nearest_in_bank,
    padded_code_dim,
    search_segments,
    visit_tile,
)

__all__ = [
    "SEGMENT_ROWS",
    "crop_pairs",
    "encode_segments",
    "extract_patches",
    "instruction_sets",
    "nearest",
    "nearest_in_bank",
    "padded_code_dim",
    "score_map",
    "search_segments",
    "use_instruction_set",
    "use_method",
    "use_workspace_limit",
    "visit_tile",
]
