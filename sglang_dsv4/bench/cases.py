"""Named pieces of work: which tokens of which requests one step holds."""

from dataclasses import dataclass

PAGE_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        name (str): for people.
        starts (tuple[int, ...]): tokens each request had before.
        extends (tuple[int, ...]): new tokens of each request.
    """

    name: str
    starts: tuple[int, ...]
    extends: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """New tokens in all."""
        return sum(self.extends)

    @property
    def num_requests(self) -> int:
        """Requests in the step."""
        return len(self.starts)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each request has after the step."""
        return [start + count for start, count in zip(self.starts, self.extends, strict=True)]

    def num_closed(self, ratio: int) -> int:
        """Blocks that the step closes."""
        return sum(length // ratio - start // ratio for start, length in zip(self.starts, self.lengths, strict=True))

    def describe(self) -> str:
        """Shape in a few characters."""
        return f"{self.num_requests} requests, {self.num_tokens} tokens"


def decode_case(batch: int, ratio: int, boundary: bool) -> Case:
    """One token per request; lengths over all residues of ``ratio``, or every request at the end of a block."""
    step = 1 if batch >= ratio else ratio // batch
    starts = tuple(1024 + (ratio - 1 if boundary else (i * step) % ratio) + ratio * (i % 7) for i in range(batch))
    kind = "boundary" if boundary else "mixed"
    return Case(f"decode-b{batch}-{kind}", starts, (1,) * batch)


def prefill_case(tokens: int, requests: int = 1, start: int = 0) -> Case:
    """``tokens`` new tokens shared out evenly."""
    each = tokens // requests
    tail = f"-from{start}" if start else ""
    return Case(f"prefill-{requests}x{each}{tail}", (start,) * requests, (each,) * requests)


def cases(ratio: int, quick: bool) -> list[Case]:
    """Cases of a layer with blocks of ``ratio`` tokens."""
    decode = [decode_case(batch, ratio, False) for batch in ((1, 32, 256) if quick else (1, 8, 32, 64, 128, 256))]
    decode += [decode_case(batch, ratio, True) for batch in ((1, 256) if quick else (1, 32, 128, 256))]
    verify = [Case("verify-b64-4", tuple(1024 + i for i in range(64)), (4,) * 64)]
    lengths = (1024, 8192, 32768) if quick else (256, 1024, 4096, 8192, 16384, 32768)
    prefill = [prefill_case(tokens) for tokens in lengths]
    prefill += [prefill_case(8192, 16), prefill_case(8192, 1, 1027), prefill_case(8190 + 1, 1, 2048)]
    mixed = Case("mixed-64+4096", (*(1024 + i for i in range(64)), 2048), (1,) * 64 + (4096,))
    return decode + verify + prefill + [mixed]
