"""Kernels on raw pointers; `patchsvdd_fast.ops` validates, allocates and calls them."""

from collections.abc import Callable
from enum import Enum

cuda_architectures: str

class PixelType(Enum):
    UINT8 = 0
    FLOAT16 = 1
    FLOAT32 = 2

class SearchMethod(Enum):
    AUTO = 0
    PLAIN = 1
    SCREENED = 2

class PairKind(Enum):
    POSITION = 0
    NEIGHBOUR = 1
    VIEW = 2

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
        bank_is_half: bool,
        method: SearchMethod,
        query_groups: int,
        bank_groups: int,
        rows_per_group: int,
        neighbours: int,
        ids: int,
        first_row: int,
        squared: int,
        indices: int,
        workspace: int,
        workspace_limit: int,
        context: int,
    ) -> bool:
        """Whether the bank seemed finite; true on a GPU, which does not look."""

    @staticmethod
    def nearest_workspace(
        queries: int,
        rows: int,
        dim: int,
        method: SearchMethod,
        has_groups: bool,
        neighbours: int,
        limit: int,
    ) -> int: ...
    @staticmethod
    def finish_search(count: int, distances: int, indices: int, context: int) -> None: ...
    @staticmethod
    def crop_pairs(
        images: int,
        channels: int,
        height: int,
        width: int,
        pairs: int,
        size: int,
        kind: PairKind,
        first_pair: int,
        max_redraws: int,
        seed: int,
        step: int,
        colour_shift: float,
        pixel_noise: float,
        pixels: int,
        mean: int,
        image_of: int,
        patches: int,
        corners: int,
        labels: int,
        context: int,
    ) -> None: ...

class cpu(Backend):  # noqa: N801 (a submodule)
    class RowCodes:
        def __init__(
            self,
            block_rows: int,
            codes: int,
            bias: int,
            centres: int,
            scales: int,
            slack: int,
        ) -> None: ...

    class LeadingAxes:
        def __init__(self, projection: cpu.Projection, error: float) -> None: ...

    class CodedRows:
        def __init__(
            self,
            rows: int,
            dim: int,
            data: int,
            is_half: bool,
            codes: cpu.RowCodes,
            leading_axes: cpu.LeadingAxes,
            leading: cpu.RowCodes,
        ) -> None: ...

    @staticmethod
    def code_block_rows(dim: int) -> int: ...
    @staticmethod
    def leading_images(
        leading_axes: cpu.LeadingAxes,
        rows: int,
        data: int,
        is_half: bool,
        images: int,
        errors: int,
        context: int,
    ) -> None: ...
    @staticmethod
    def encode_rows(bank: cpu.CodedRows, context: int) -> None: ...
    @staticmethod
    def nearest_in_codes(
        bank: cpu.CodedRows,
        method: SearchMethod,
        queries: int,
        query_data: int,
        query_groups: int,
        bank_groups: int,
        rows_per_group: int,
        neighbours: int,
        squared: int,
        indices: int,
        matches: cpu.Matches | None,
        context: int,
    ) -> None: ...

    class Matches:
        def __init__(self, most: int) -> None: ...
        def total(self) -> int: ...
        def take(self, queries: int, starts: int, squared: int, ids: int, context: int) -> None: ...

    @staticmethod
    def within(
        queries: int,
        bank_rows: int,
        dim: int,
        query_data: int,
        bank_data: int,
        bank_is_half: bool,
        method: SearchMethod,
        query_groups: int,
        bank_groups: int,
        rows_per_group: int,
        first_row: int,
        limits: int,
        matches: cpu.Matches,
        context: int,
    ) -> bool: ...
    @staticmethod
    def squared_limits(count: int, radii: int, is_cosine: bool, limits: int) -> None: ...
    @staticmethod
    def finish_cosine_search(count: int, distances: int, indices: int, context: int) -> None: ...
    @staticmethod
    def normalise(rows: int, dim: int, data: int, normalised: int, context: int) -> int: ...

    class Projection:
        def __init__(self, dim: int, axes: int, mean: int, basis: int, stretch: float) -> None: ...

    class ClusteredBank:
        def __init__(
            self,
            projection: cpu.Projection,
            rows: int,
            clusters: int,
            packs: int,
            data: int,
            is_half: bool,
            ids: int,
            starts: int,
            blocks: int,
            codes: int,
            bias: int,
            block_radius: int,
            centroids: int,
            scales: int,
            slack: int,
            code_slack: int,
            reach: int,
            centroid_tiles: int,
            gaps: int,
        ) -> None: ...

    @staticmethod
    def project(
        projection: cpu.Projection,
        rows: int,
        data: int,
        is_half: bool,
        projected: int,
        errors: int,
        context: int,
    ) -> None: ...
    @staticmethod
    def pack_clusters(
        bank: cpu.ClusteredBank, projected: int, errors: int, radii: int, context: int
    ) -> None: ...
    @staticmethod
    def link_clusters(bank: cpu.ClusteredBank, context: int) -> None: ...
    @staticmethod
    def release_memory() -> None: ...
    @staticmethod
    def nearest_in_clusters(
        bank: cpu.ClusteredBank,
        queries: int,
        query_data: int,
        query_groups: int,
        bank_groups: int,
        rows_per_group: int,
        neighbours: int,
        squared: int,
        indices: int,
        matches: cpu.Matches | None,
        context: int,
    ) -> int: ...
    @staticmethod
    def coreset(
        rows: int,
        dim: int,
        count: int,
        first: int,
        data: int,
        is_half: bool,
        method: SearchMethod,
        projected: int,
        errors: int,
        axes: int,
        stretch: float,
        scale: float,
        chosen: int,
        distances: int,
        context: int,
    ) -> float: ...
    @staticmethod
    def first_bad_row(data: int, rows: int, dim: int, is_half: bool, context: int) -> int: ...
    @staticmethod
    def set_progress(
        callback: Callable[[float], None] | None,
    ) -> Callable[[float], None] | None: ...
    @staticmethod
    def instruction_sets() -> list[str]: ...
    @staticmethod
    def instruction_set() -> str: ...
    @staticmethod
    def set_instruction_set(name: str) -> None: ...

class Cuda(Backend):
    """The submodule `cuda`."""

    SEGMENT_ROWS: int

    class SegmentedBank:
        def __init__(
            self,
            rows: int,
            dim: int,
            clusters: int,
            segments: int,
            data: int,
            is_half: bool,
            ids: int,
            segment_starts: int,
            segment_clusters: int,
            cluster_segments: int,
            least_radius: int,
            largest_radius: int,
            centroids: int,
            gaps: int,
            centre: int,
            largest: int,
            halves: int,
            squares: int,
            errors: int,
            segment_norms: int,
            segment_errors: int,
        ) -> None: ...

    @staticmethod
    def coreset_steps(
        rows: int,
        dim: int,
        data: int,
        is_half: bool,
        begin: int,
        end: int,
        squared: int,
        keys: int,
        context: int,
    ) -> None: ...
    @staticmethod
    def visit_tile(dim: int) -> int: ...
    @staticmethod
    def padded_dim(dim: int) -> int: ...
    @staticmethod
    def encode_segments(bank: Cuda.SegmentedBank, context: int) -> None: ...
    @staticmethod
    def nearest_in_segments_workspace(
        bank: Cuda.SegmentedBank, queries: int, limit: int
    ) -> int: ...
    @staticmethod
    def nearest_in_segments(
        bank: Cuda.SegmentedBank,
        queries: int,
        query_data: int,
        own: int,
        own_starts: int,
        query_groups: int,
        bank_groups: int,
        rows_per_group: int,
        squared: int,
        indices: int,
        workspace: int,
        workspace_limit: int,
        visits: int,
        context: int,
    ) -> None: ...

cuda: type[Cuda] | None
