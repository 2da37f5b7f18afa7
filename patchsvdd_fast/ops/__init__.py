"""The native operations as torch ops, and the settings of searches.

Every op validates its arguments, allocates its results with torch, and passes raw pointers to the
extension. The backend follows the device of the input: CPU kernels on `torch.get_num_threads()`
threads, CUDA kernels on the current stream.
"""

from .backends import instruction_sets, use_instruction_set, use_method, use_workspace_limit
from .patches import crop_pairs, extract_patches, score_map
from .radius import Within, within
from .search import nearest, normalise

__all__ = [
    "Within",
    "crop_pairs",
    "extract_patches",
    "instruction_sets",
    "nearest",
    "normalise",
    "score_map",
    "use_instruction_set",
    "use_method",
    "use_workspace_limit",
    "within",
]
