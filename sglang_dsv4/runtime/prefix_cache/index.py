"""Which beginnings of sequences the cache still holds, so that a new one continues from there."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from sglang_dsv4.cache import CompressedKVCache, Request
from sglang_dsv4.cache.pages.room import Growth
from sglang_dsv4.cache.pages.tables import NULL_PAGE, PageList
from sglang_dsv4.cache.regions import Owner
from sglang_dsv4.runtime.prefix_cache.tree import Entry, PrefixTree
from sglang_dsv4.runtime.sequence import LiveSequence


@dataclass
class IndexCounters:
    """How often the index helped.

    Attributes:
        lookups (int): sequences that asked.
        hits (int): those that found something.
        tokens_asked (int): tokens of all that asked.
        tokens_hit (int): those that need not be computed.
        evictions (int): entries dropped for room.
    """

    lookups: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_hit: int = 0
    evictions: int = 0

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


class PrefixIndex:
    """A radix index: every page boundary that a sequence passed, and every point where one ended.

    A boundary costs pages only, an end also a copy of the stream state. Entries hold pages as snapshots do, and go, least
    recently used first, when somebody needs the room.

    Args:
        cache (CompressedKVCache): owns its pages.
        max_ends (int): ends kept, at most.

    Attributes:
        counters (IndexCounters): how often it helped.
        held (dict[Owner, Counter[int]]): of each history and window page, how many entries hold it.
    """

    def __init__(self, cache: CompressedKVCache, max_ends: int) -> None:
        self.counters = IndexCounters()
        self._cache = cache
        self._max_ends = max_ends
        self._tree = PrefixTree(self.page_tokens)
        self._entries: dict[int, Entry] = {}  # by snapshot, least recently used first
        self.held = {Owner.HISTORY_PAGE: Counter[int](), Owner.WINDOW_PAGE: Counter[int]()}

    @property
    def page_tokens(self) -> int:
        """Tokens between two boundaries."""
        return self._cache.spec.page_tokens

    @property
    def num_ends(self) -> int:
        """Ends kept now."""
        return sum(entry.tail is not None for entry in self._entries.values())

    @property
    def num_boundaries(self) -> int:
        """Page boundaries kept now."""
        return len(self._entries) - self.num_ends

    @property
    def num_pages(self) -> int:
        """History pages that an entry holds, each counted once."""
        return len(self.held[Owner.HISTORY_PAGE])

    @property
    def state_bytes(self) -> int:
        """Bytes of stream state and logits, which lie outside the cache's pools."""
        kept = [t for entry in self._entries.values() for t in (*entry.snapshot.state, entry.logits)]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)

    def known_length(self, tokens: Sequence[int]) -> int:
        """How many of these tokens a new sequence would find, other open sequences aside."""
        best = self._best(tokens)
        return 0 if best is None else best.snapshot.seq_len

    def growth(self, tokens: list[int], others: Iterable[LiveSequence] = ()) -> Growth:
        """What a new sequence of these tokens adds to what it would begin with; arguments as in `begin`."""
        entry, twin = self._source(tokens, others)
        if twin is not None and twin.request is not None:
            pages, length = twin.request.pages, twin.num_fed
        else:
            pages, length = (PageList(), 0) if entry is None else (entry.snapshot.pages, entry.snapshot.seq_len)
        return Growth(pages, length, len(tokens), is_open=False)

    def begin(self, sequence: LiveSequence, others: Iterable[LiveSequence] = ()) -> None:
        """Give a sequence a request that holds as many of its tokens as possible.

        Args:
            sequence (LiveSequence): without a request.
            others (Iterable[LiveSequence]): open sequences; one whose tokens all begin this one's is forked.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
        """
        tokens = sequence.tokens
        entry, twin = self._source(tokens, others)
        if twin is not None and twin.request is not None:
            sequence.request = self._cache.fork(twin.request)
            sequence.logits = twin.logits
        elif entry is not None:
            sequence.request = self._continue(entry)
            sequence.logits = entry.logits
        else:
            sequence.request = self._cache.open()
        sequence.cached_tokens = sequence.num_fed
        if sequence.num_pending:
            sequence.logits = None
        counters = self.counters
        counters.lookups += 1
        counters.hits += sequence.num_fed > 0
        counters.tokens_asked += len(tokens)
        counters.tokens_hit += sequence.num_fed

    def keep_boundary(self, sequence: LiveSequence) -> None:
        """Keep a sequence if it is at a page boundary."""
        request, length = sequence.request, sequence.num_fed
        if request is None or length == 0 or length % self.page_tokens or sequence.is_foreign:
            return
        node = self._tree.grow(sequence.tokens[:length])
        if node.boundary is not None:
            self._use(node.boundary)
        else:
            self._add(Entry(node, None, self._cache.snapshot(request, pages_only=True), None))

    def keep_end(self, sequence: LiveSequence) -> None:
        """Keep a sequence as it is now, wherever it is."""
        request, logits, length = sequence.request, sequence.logits, sequence.num_fed
        if request is None or logits is None or sequence.num_pending or sequence.is_foreign or self._max_ends == 0:
            return
        tail = tuple(sequence.tokens[length - length % self.page_tokens : length])
        node = self._tree.grow(sequence.tokens[:length])
        if tail in node.ends:
            self._use(node.ends[tail])
            return
        self._add(Entry(node, tail, self._cache.snapshot(request), logits))
        if self.num_ends > self._max_ends:
            self._drop(next(entry for entry in self._entries.values() if entry.tail is not None))

    def evict(self) -> bool:
        """Drop the entry that was not used for the longest time, of those that stand in somebody's way.

        These are first the entries whose history pages nobody else holds; then those that end within a page, which an open
        sequence would have to copy in order to write on; then those whose window page nobody else holds.

        Returns:
            bool: whether there was one; several may have to go until a page is free.
        """
        stands_in_the_way: tuple[Callable[[Entry], object], ...] = (
            lambda entry: self._frees(Owner.HISTORY_PAGE, entry),
            lambda entry: entry.tail,
            lambda entry: self._frees(Owner.WINDOW_PAGE, entry),
        )
        for rule in stands_in_the_way:
            entry = next(filter(rule, self._entries.values()), None)
            if entry is not None:
                self._drop(entry)
                self.counters.evictions += 1
                return True
        return False

    def clear(self) -> None:
        """Drop everything."""
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _best(self, tokens: Sequence[int]) -> Entry | None:
        best = None
        for entry in self._tree.matches(tokens):
            snapshot = entry.snapshot
            if self._suits(snapshot.seq_len, snapshot.min_len, len(tokens), entry.logits is not None):
                best = entry
        return best

    def _source(self, tokens: list[int], others: Iterable[LiveSequence]) -> tuple[Entry | None, LiveSequence | None]:
        """The entry that begins the tokens with the longest part, and an open sequence that does so with a longer one."""
        entry = self._best(tokens)
        return entry, self._best_other(tokens, others, 0 if entry is None else entry.snapshot.seq_len)

    def _best_other(self, tokens: list[int], others: Iterable[LiveSequence], longer_than: int) -> LiveSequence | None:
        best = None
        for other in others:
            request, length = other.request, other.num_fed
            if request is None or other.is_foreign or length <= longer_than or other.tokens[:length] != tokens[:length]:
                continue
            has_logits = other.logits is not None and not other.num_pending
            if self._suits(length, request.min_len, len(tokens), has_logits):
                best, longer_than = other, length
        return best

    def _suits(self, length: int, min_len: int, wanted: int, has_logits: bool) -> bool:
        # A whole match must bring its logits. And however a sequence began, it can be rolled back by the draft tokens.
        reaches = length < wanted or (length == wanted and has_logits)
        return reaches and min_len <= max(0, wanted - self._cache.spec.max_draft_tokens)

    def _continue(self, entry: Entry) -> Request:
        kept = entry.snapshot
        request = self._cache.restore(kept)
        self._use(entry)
        return request

    def _use(self, entry: Entry) -> None:
        """Make an entry the last to go, and the boundaries before it the very last."""
        chain, node = [entry], entry.node.parent if entry.tail is None else entry.node
        while node is not None:
            if node.boundary is not None:
                chain.append(node.boundary)
            node = node.parent
        for used in chain:
            self._entries[used.snapshot.snapshot_id] = self._entries.pop(used.snapshot.snapshot_id)

    def _add(self, entry: Entry) -> None:
        self._tree.add(entry)
        self._entries[entry.snapshot.snapshot_id] = entry
        for kind, pages in self._pages(entry).items():
            self.held[kind].update(pages)
        self._use(entry)

    def _drop(self, entry: Entry) -> None:
        self._tree.remove(entry)
        del self._entries[entry.snapshot.snapshot_id]
        for kind, pages in self._pages(entry).items():
            self.held[kind].subtract(pages)
            for page in pages:
                if not self.held[kind][page]:
                    del self.held[kind][page]
        self._cache.close(entry.snapshot)

    def _frees(self, kind: Owner, entry: Entry) -> bool:
        """Whether entries are the only owners of one of its pages."""
        books = self._cache.requests
        return any(books.num_owners(kind, page) == self.held[kind][page] for page in self._pages(entry)[kind])

    @staticmethod
    def _pages(entry: Entry) -> dict[Owner, list[int]]:
        pages = entry.snapshot.pages
        window = [page for page in pages.window if page != NULL_PAGE]
        return {Owner.HISTORY_PAGE: pages.history, Owner.WINDOW_PAGE: window}
