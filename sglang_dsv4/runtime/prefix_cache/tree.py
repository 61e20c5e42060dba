"""A tree of prefixes: one node per page of tokens, and at each node what is kept of the sequences that went through it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from sglang_dsv4.cache import Snapshot

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A prefix of whole pages.

    Attributes:
        parent (Node | None): the prefix without the last page; None at the root.
        page (Tokens): the tokens of the last page.
        children (dict[Tokens, Node]): longer prefixes, by the tokens of their last page.
        boundary (Entry | None): the prefix itself.
        ends (dict[Tokens, Entry]): the prefix and part of a page, by the tokens of that part.
    """

    parent: "Node | None" = None
    page: Tokens = ()
    children: dict[Tokens, "Node"] = field(default_factory=dict)
    boundary: "Entry | None" = None
    ends: dict[Tokens, "Entry"] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """Whether it leads nowhere."""
        return not (self.children or self.ends or self.boundary)


@dataclass(eq=False)
class Entry:
    """Something kept.

    Attributes:
        node (Node): where.
        tail (Tokens | None): tokens behind the node's; None for the boundary itself.
        snapshot (Snapshot): pages, and for an end also stream state.
        logits (torch.Tensor | None): what follows; None for a boundary.
    """

    node: Node
    tail: Tokens | None
    snapshot: Snapshot
    logits: torch.Tensor | None


class PrefixTree:
    """Finds the entries whose tokens begin a sequence."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._root = Node()

    def path(self, tokens: Sequence[int]) -> Iterator[Node]:
        """The nodes that begin ``tokens``, shortest first; the root among them."""
        node, begin = self._root, 0
        while True:
            yield node
            begin += self._page_tokens
            page = tuple(tokens[begin - self._page_tokens : begin])
            if page not in node.children:
                return
            node = node.children[page]

    def matches(self, tokens: Sequence[int]) -> Iterator[Entry]:
        """Every entry that begins ``tokens``, shortest first."""
        for depth, node in enumerate(self.path(tokens)):
            if node.boundary is not None:
                yield node.boundary
            rest = tuple(tokens[depth * self._page_tokens :][: self._page_tokens])
            for tail in sorted(node.ends, key=len):
                if rest[: len(tail)] == tail:
                    yield node.ends[tail]

    def grow(self, tokens: Sequence[int]) -> Node:
        """The node of the whole pages of ``tokens``, made where it is missing."""
        node = self._root
        whole = len(tokens) - len(tokens) % self._page_tokens
        for begin in range(0, whole, self._page_tokens):
            page = tuple(tokens[begin : begin + self._page_tokens])
            node = node.children.setdefault(page, Node(node, page))
        return node

    def add(self, entry: Entry) -> None:
        """Put an entry at its node."""
        if entry.tail is not None:
            entry.node.ends[entry.tail] = entry
        else:
            entry.node.boundary = entry

    def remove(self, entry: Entry) -> None:
        """Take an entry away, and the nodes that lead to nothing without it."""
        node = entry.node
        if entry.tail is not None:
            del node.ends[entry.tail]
        else:
            node.boundary = None
        while node.parent is not None and node.is_empty():
            del node.parent.children[node.page]
            node = node.parent
