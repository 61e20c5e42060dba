"""The handle of one sequence in a cache, and of a moment of one."""

from dataclasses import dataclass

import torch

from sglang_dsv4.cache.pages.tables import PageList


class Request:
    """One sequence. Made by `CompressedKVCache.open`, `fork`, `restore` or `load`; only the cache changes it.

    Attributes:
        req_id (int): never used twice by one cache.
        state_slot (int): its row in the stream state.
        seq_len (int): committed tokens.
        min_len (int): the shortest length it can be truncated to without a snapshot.
        pages (PageList): its pages.
        changed_at (int): the cache's epoch when it changed last; a plan made before is stale.
        is_damaged (bool): an operation on it failed half way.
        extra (dict[str, str]): what was saved with it, if it was loaded.
    """

    __slots__ = ("changed_at", "extra", "is_damaged", "min_len", "pages", "req_id", "seq_len", "state_slot")

    def __init__(self, req_id: int, state_slot: int) -> None:
        self.req_id = req_id
        self.state_slot = state_slot
        self.seq_len = 0
        self.min_len = 0
        self.pages = PageList()
        self.changed_at = 0
        self.is_damaged = False
        self.extra: dict[str, str] = {}

    def tail_len(self, ratio: int) -> int:
        """Tokens of the open block: ``seq_len % ratio``."""
        return self.seq_len % ratio

    def num_entries(self, ratio: int) -> int:
        """Closed blocks: ``seq_len // ratio``."""
        return self.seq_len // ratio

    def __repr__(self) -> str:
        return f"Request(req_id={self.req_id}, seq_len={self.seq_len})"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One moment of a sequence: it shares the pages of that moment and holds a copy of the stream state.

    Made by `CompressedKVCache.snapshot`; held until `CompressedKVCache.close`.

    Attributes:
        snapshot_id (int): never used twice by one cache.
        req_id (int): the sequence it was taken of.
        seq_len (int): its tokens.
        min_len (int): as in `Request`.
        pages (PageList): its pages.
        state (tuple[torch.Tensor, ...]): its rows of every stream-state tensor, in the order of the layers; empty where pages alone are held.
    """

    snapshot_id: int
    req_id: int
    seq_len: int
    min_len: int
    pages: PageList
    state: tuple[torch.Tensor, ...]

    def __repr__(self) -> str:
        return f"Snapshot(snapshot_id={self.snapshot_id}, req_id={self.req_id}, seq_len={self.seq_len})"
