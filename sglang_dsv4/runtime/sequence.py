"""A sequence of tokens, of which the cache holds the first part or all."""

from dataclasses import dataclass, field

import torch

from sglang_dsv4.cache import Request


@dataclass(eq=False)
class LiveSequence:
    """Tokens and their place in the cache.

    Attributes:
        tokens (list[int]): all of them.
        request (Request | None): holds the first ``request.seq_len`` of them; None while the sequence waits.
        logits (torch.Tensor | None): ``[vocab]`` fp32, what follows the last token; None while some are not fed.
        cached_tokens (int): tokens that another sequence had computed when this one began.
        is_foreign (bool): its rows may come from other weights: no sequence but its own forks begins with them.
    """

    tokens: list[int]
    request: Request | None = None
    logits: torch.Tensor | None = None
    cached_tokens: int = field(default=0)
    is_foreign: bool = False

    @property
    def num_fed(self) -> int:
        """Tokens in the cache."""
        return 0 if self.request is None else self.request.seq_len

    @property
    def num_pending(self) -> int:
        """Tokens still to be fed."""
        return len(self.tokens) - self.num_fed

    def pending(self, count: int) -> list[int]:
        """The next ``count`` tokens to feed."""
        return self.tokens[self.num_fed : self.num_fed + count]
