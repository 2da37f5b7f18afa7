"""Kernels on raw pointers; `patchsvdd_fast.ops` validates, allocates and calls them."""

from enum import Enum

cuda_architectures: str

class PixelType(Enum):
    UINT8 = 0
    FLOAT16 = 1
    FLOAT32 = 2

class PatchGrid:
    def __init__(
        self,
        images: int,
        channels: int,
        height: int,
        width: int,
        rows: int,
        columns: int,
        size: int,
        stride: int,
    ) -> None: ...

class Backend:
    """What `cpu` and `cuda` both offer; `context` is the number of threads or the stream."""

    @staticmethod
    def extract_patches(
        grid: PatchGrid,
        images: int,
        mean: int,
        patches: int,
        element_size: int,
        pixel_type: PixelType,
        context: int,
    ) -> None: ...
    @staticmethod
    def extract_patches_backward(
        grid: PatchGrid,
        patch_gradients: int,
        image_gradients: int,
        is_double: bool,
        context: int,
    ) -> None: ...
    @staticmethod
    def score_map(
        grid: PatchGrid, distances: int, row_sums: int, maps: int, context: int
    ) -> None: ...
    @staticmethod
    def nearest(
        queries: int,
        bank_rows: int,
        dim: int,
        query_data: int,
        bank_data: int,
        distances: int,
        indices: int,
        bank_splits: int,
        split_distances: int,
        split_indices: int,
        context: int,
    ) -> None: ...

class cpu(Backend):  # noqa: N801 (a submodule)
    @staticmethod
    def instruction_sets() -> list[str]: ...
    @staticmethod
    def instruction_set() -> str: ...
    @staticmethod
    def set_instruction_set(name: str) -> None: ...

cuda: type[Backend] | None
