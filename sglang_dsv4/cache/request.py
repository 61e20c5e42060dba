"""The handle of one sequence in a cache."""

from sglang_dsv4.cache.pages import PageList


class Request:
    """One sequence. Made by `CompressedKVCache.open`; only the cache changes it.

    Attributes:
        req_id (int): never used twice by one cache.
        state_slot (int): its row in the stream state.
        seq_len (int): committed tokens.
        pages (PageList): its pages.
    """

    __slots__ = ("pages", "req_id", "seq_len", "state_slot")

    def __init__(self, req_id: int, state_slot: int) -> None:
        self.req_id = req_id
        self.state_slot = state_slot
        self.seq_len = 0
        self.pages = PageList()

    def tail_len(self, ratio: int) -> int:
        """Tokens of the open block: ``seq_len % ratio``."""
        return self.seq_len % ratio

    def num_entries(self, ratio: int) -> int:
        """Closed blocks: ``seq_len // ratio``."""
        return self.seq_len // ratio

    def __repr__(self) -> str:
        return f"Request(req_id={self.req_id}, seq_len={self.seq_len})"
