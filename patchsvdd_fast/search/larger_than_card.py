"""Searching a bank larger than a GPU's memory: it is copied there and searched chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops.checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_numbers,
    as_vectors,
    check_finite_rows,
    check_search_operands,
    check_shape,
)
from ..ops.search import as_neighbours
from ..ops.search_kernels import Found, search_rows


def nearest_streamed(
    queries: Tensor,
    bank: Tensor | FloatArray,
    *,
    k: int | None = None,
    rows_at_once: int = 1 << 20,
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.nearest` for queries on a device and a bank in the computer's memory.

    queries: [Q, D] float32, on the device to search on.
    bank: [M, D] float32 or float16 on the CPU, M >= 1; may be a mapped file. Pinned memory is
        copied from directly.
    k: how many neighbours to find, 1 to 32; None: one, and no axis for it in the results.
    rows_at_once: bank rows in a chunk. The device holds two chunks: one is copied while the other
        is searched.
    exclude_same_group: the groups of the queries [Q] and of the bank rows [M], int64; a query
        cannot match rows of its own group.
    progress: called after each chunk with the share done, 0 to 1.

    Returns distances [Q] float32 and bank rows [Q] int64 on the queries' device, [Q, k] with k, as
    `ops.nearest` does: the nearest of all chunks, bit for bit the answer of one search. Raises what
    `ops.nearest` does.
    """
    queries, rows = as_vectors("queries", queries), as_vectors("bank", bank, halves=True)
    check_shape("bank", rows, "M, D")
    if rows.device.type != "cpu":
        raise ValueError(f"bank must be in the computer's memory to be streamed, got {rows.device}")
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    if len(rows) == 0:
        raise ValueError(f"bank must hold at least one embedding, got shape {list(rows.shape)}")
    query_groups = bank_groups = None
    if exclude_same_group is not None:
        query_groups = as_numbers("query_groups", exclude_same_group[0]).to(queries.device)
        bank_groups = as_numbers("bank_groups", exclude_same_group[1])
        if bank_groups.shape != rows.shape[:1]:
            raise ValueError(
                f"bank_groups must have shape [{len(rows)}], got {list(bank_groups.shape)}"
            )

    k = as_neighbours(k)
    check_search_operands(queries, rows[:1].to(queries.device))
    check_finite_rows("queries", queries)
    found = Found.nothing(queries, k)
    for first, chunk in _chunks_on(queries.device, rows, rows_at_once):
        try:
            check_finite_rows("bank", chunk)
        except ValueError as error:
            raise ValueError(f"in bank rows from {first} on: {error}") from error
        groups = NO_GROUPS
        if query_groups is not None and bank_groups is not None:
            part = bank_groups[first : first + len(chunk)].to(queries.device)
            groups = Groups(query_groups, part)
            groups.check(queries, len(chunk))
        search_rows(found, queries, chunk, groups.contiguous(), first_row=first)
        if progress is not None:
            progress((first + len(chunk)) / len(rows))
    return found.finish(k)


def _chunks_on(
    device: torch.device, rows: Tensor, rows_at_once: int
) -> Iterator[tuple[int, Tensor]]:
    """Each chunk's first row number, and its rows on the device; the next is copied meanwhile."""
    firsts = range(0, len(rows), rows_at_once)
    if device.type == "cpu":
        for first in firsts:
            yield first, rows[first : first + rows_at_once]
        return
    most = min(rows_at_once, len(rows))
    buffers = [  # two, or one for a single chunk
        torch.empty(most, *rows.shape[1:], dtype=rows.dtype, device=device) for _ in firsts[:2]
    ]
    staging = None if rows.is_pinned() else [_pinned_like(buffer) for buffer in buffers]
    search = torch.cuda.current_stream(device)
    copies = torch.cuda.Stream(device)
    arrived = [torch.cuda.Event(), torch.cuda.Event()]
    searched = [torch.cuda.Event(), torch.cuda.Event()]

    def start_copy(first: int) -> None:
        side = first // rows_at_once % 2
        source = rows[first : first + rows_at_once]
        if staging is not None:
            arrived[side].synchronize()  # the copy before last has left the staging memory
            source = staging[side][: len(source)].copy_(source)
        with torch.cuda.stream(copies):
            copies.wait_event(searched[side])
            buffers[side][: len(source)].copy_(source, non_blocking=True)
            arrived[side].record(copies)

    copies.wait_stream(search)
    try:
        start_copy(0)
        for first in firsts:
            side = first // rows_at_once % 2
            if first + rows_at_once < len(rows):
                start_copy(first + rows_at_once)
            search.wait_event(arrived[side])
            yield first, buffers[side][: min(rows_at_once, len(rows) - first)]
            searched[side].record(search)
    finally:
        search.wait_stream(copies)  # before the buffers' memory is reused


def _pinned_like(buffer: Tensor) -> Tensor:
    return torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu", pin_memory=True)
