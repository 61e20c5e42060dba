"""What there is to draw of one sequence: its tokens, and where the cache has them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLane:
    """The blocks of one ratio.

    Attributes:
        kind (str): ``"csa"`` or ``"hca"``.
        ratio (int): tokens per block.
        num_layers (int): layers that have this ratio.
        num_entries (int): closed blocks, each pooled into one entry.
        tail_len (int): tokens of the open block.
        stream_begin (int): first token that the stream state still knows.
        stream_rows (str): what the stream state holds, in words.
    """

    kind: str
    ratio: int
    num_layers: int
    num_entries: int
    tail_len: int
    stream_begin: int
    stream_rows: str


@dataclass(frozen=True)
class PageBox:
    """One page.

    Attributes:
        begin (int): its first token.
        end (int): one past its last token so far.
        history (int): history page.
        history_owners (int): sequences, snapshots and index entries that hold it.
        window (int | None): window page; None where it was released.
        window_owners (int): as `history_owners`; 0 where it was released.
    """

    begin: int
    end: int
    history: int
    history_owners: int
    window: int | None
    window_owners: int


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence in one cache.

    Attributes:
        seq_len (int): tokens in the cache.
        num_pending (int): tokens that follow and are fed with the next step.
        pieces (tuple[str, ...]): the text of each token.
        window (int): raw rows that a query attends to.
        window_begin (int): first token whose raw row the next token attends to.
        page_tokens (int): tokens per page.
        lanes (tuple[BlockLane, ...]): blocks, by ratio.
        pages (tuple[PageBox, ...]): pages.
    """

    seq_len: int
    num_pending: int
    pieces: tuple[str, ...]
    window: int
    window_begin: int
    page_tokens: int
    lanes: tuple[BlockLane, ...]
    pages: tuple[PageBox, ...]
