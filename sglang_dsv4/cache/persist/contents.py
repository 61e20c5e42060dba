"""What the tensors of a saved sequence look like: a function of the spec and of the sequence's two lengths alone."""

import torch

from sglang_dsv4.spec import CacheSpec

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def history_shapes(spec: CacheSpec, seq_len: int, index: int) -> Shapes:
    """Of history page ``index``: stored rows of its closed blocks."""
    found: Shapes = {}
    for layer in spec.layers:
        if layer.ratio:
            per_page = spec.page_tokens // layer.ratio
            closed = min(seq_len // layer.ratio - index * per_page, per_page)
            name = f"layer.{layer.layer_id}"
            found[f"{name}.entries"] = (closed, spec.rows.row_bytes), torch.uint8
            if layer.indexed:
                found[f"{name}.index_keys"] = (closed, spec.index_keys.row_bytes), torch.uint8
    return found


def window_shapes(spec: CacheSpec, seq_len: int, min_len: int, index: int) -> Shapes:
    """Of window page ``index``: rows that a query can reach, and boundary state as far as it is written."""
    begin, end = window_range(spec, seq_len, min_len, index)
    found: Shapes = {}
    for layer in spec.layers:
        name = f"layer.{layer.layer_id}"
        found[f"{name}.window"] = (end - begin, spec.rows.row_bytes), torch.uint8
        if layer.overlap:
            written = max(0, layer.ratio + end - spec.page_tokens)
            for part, dim in _overlapping(spec, layer.indexed).items():
                found[f"{name}.boundary.{part}"] = (written, 2, dim), torch.float32
    return found


def state_shapes(spec: CacheSpec, seq_len: int, min_len: int) -> Shapes:
    """Of the stream state: rows and accumulators that the sequence can still need."""
    found: Shapes = {}
    for layer in spec.layers:
        name = f"layer.{layer.layer_id}"
        if layer.overlap:
            kept = seq_len - first_stream_position(min_len, layer.ratio)
            for part, dim in _overlapping(spec, layer.indexed).items():
                found[f"{name}.streams.{part}"] = (kept, 4 * dim), torch.float32
        elif layer.ratio:
            kept = seq_len - first_accumulator_position(min_len)
            found[f"{name}.accumulators"] = (kept, 3, spec.head_dim), torch.float32
    return found


def window_range(spec: CacheSpec, seq_len: int, min_len: int, index: int) -> tuple[int, int]:
    """First and last row of window page ``index`` that a query can reach."""
    first = index * spec.page_tokens
    begin = max(0, spec.first_window_position(min_len) - first)
    return begin, min(seq_len - first, spec.page_tokens)


def first_stream_position(min_len: int, ratio: int) -> int:
    """First position whose stream row is still needed by a sequence that may be cut back to ``min_len``."""
    return max(0, min_len // ratio * ratio - ratio)


def first_accumulator_position(min_len: int) -> int:
    """First position whose accumulator is still needed by a sequence that may be cut back to ``min_len``."""
    return max(0, min_len - 1)


def _overlapping(spec: CacheSpec, indexed: bool) -> dict[str, int]:
    return {"main": spec.head_dim, "index": spec.index_dim} if indexed else {"main": spec.head_dim}
