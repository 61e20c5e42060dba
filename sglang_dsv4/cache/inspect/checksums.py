"""I8: a checksum of every stored row, kept when it is written and compared before it is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.cache.inspect.reach import Rows, Spans, load, num_rows, page_of, reachable, written
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.spec import CacheSpec

SUMS = "I8 sums"
ROWS_KEPT = 8
_INDEX_FACTOR = 0x2545F4914F6CDD1D


@dataclass(frozen=True, eq=False)
class Finding:
    """A broken invariant of stored rows.

    Attributes:
        label (str): of the invariant.
        layer_id (int): the layer.
        what (str): kind of row.
        owner (int): which of the sequences that were checked.
        index (int): which of its rows of this kind: a position, an entry, or a page.
        row (int): the row's number among all of the kind.
        page_kind (str): where it lies: ``history page``, ``window page`` or ``state slot``.
        page (int): number of that.
        expected (str): what was expected of it.
        got (str): what it is.
        bad (int): rows of this kind and layer that are wrong.
        checked (int): those that were looked at.
        rows (torch.Tensor): ``[K]`` int64, the first of them.
        values (torch.Tensor): ``[K, width]`` fp32, what they hold.
    """

    label: str
    layer_id: int
    what: str
    owner: int
    index: int
    row: int
    page_kind: str
    page: int
    expected: str
    got: str
    bad: int
    checked: int
    rows: torch.Tensor
    values: torch.Tensor

    def message(self, name: str) -> str:
        """The finding in one line; ``name`` is the sequence's."""
        return (
            f"{self.label}: request {name}: layer {self.layer_id}: {self.what} {self.index} in {self.page_kind} {self.page}: "
            f"expected {self.expected}, got {self.got} ({self.bad} of {self.checked} rows)"
        )


class RowSums:
    """Checksums of the rows of a cache whose pages somebody else owns.

    A row is summed as the fp32 values it stands for, so that every format is treated alike, together with its place in the
    sequence: a page that comes to stand at another depth is noticed, too. Changing one value always changes the sum. What
    cannot be noticed: a row that was wrong when it was written, and a page of another sequence at the same depth.

    Args:
        spec (CacheSpec): the cache's.
        layers (Sequence[LayerCache]): its layers.
        capacity (Capacity): its sizes.
    """

    def __init__(self, spec: CacheSpec, layers: Sequence[LayerCache], capacity: Capacity) -> None:
        self._spec = spec
        self._layers = layers
        self._capacity = capacity
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        self._known: dict[tuple[int, str], torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the checksums."""
        return sum(t.nbytes for kept in (self._sums, self._known) for t in kept.values())

    def record(self, spans: Spans, begins: list[int]) -> Finding | None:
        """Keep the sums of what a step wrote; the first row that is not finite, if there is one.

        Args:
            spans (Spans): the step's sequences after it.
            begins (list[int]): their lengths before it.
        """
        for cache in self._layers:
            for rows in written(self._spec, cache, spans, begins):
                values = load(self._spec, cache, rows.what, rows.rows)
                bad = torch.nonzero(~torch.isfinite(values).all(dim=1)).flatten()
                if len(bad):
                    return self._finding(cache, rows, values, bad, rows.label, "finite values", "others")
                sums, known = self._kept(cache, rows.what)
                sums[rows.rows] = self._sum(values, rows.indices)
                known[rows.rows] = True
        return None

    def verify(self, spans: Spans) -> Finding | None:
        """The first row that a query of these sequences could read, and that is not what was written; None if all are."""
        for cache in self._layers:
            for rows in reachable(self._spec, cache, spans):
                values = load(self._spec, cache, rows.what, rows.rows)
                sums, known = self._kept(cache, rows.what)
                is_known = known[rows.rows]
                right = is_known & (sums[rows.rows] == self._sum(values, rows.indices))
                bad = torch.nonzero(~right).flatten()
                if len(bad):
                    got = "another one" if bool(is_known[bad[0]]) else "a row that was never written"
                    expected = "the checksum kept when it was written"
                    return self._finding(cache, rows, values, bad, SUMS, expected, got)
        return None

    def digests(self, spans: Spans) -> list[str]:
        """One digest per sequence of all that its next query could read, whichever pages and slot it lies in.

        Sequences whose rows are equal byte for byte have equal digests; rows that differ in one value have others.
        """
        hashes = [hashlib.sha256() for _ in spans.seq_lens]
        for cache in self._layers:
            for rows in reachable(self._spec, cache, spans):
                values = load(self._spec, cache, rows.what, rows.rows)
                sums, owners = self._sum(values, rows.indices).cpu(), rows.owners.cpu()
                for owner, digest in enumerate(hashes):
                    digest.update(f"{cache.layer.layer_id} {rows.what}".encode())
                    digest.update(sums[owners == owner].numpy().tobytes())
        return [digest.hexdigest() for digest in hashes]

    def _kept(self, cache: LayerCache, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        key = (cache.layer.layer_id, what)
        if key not in self._sums:
            count = num_rows(self._spec, self._capacity, cache.layer.ratio, what)
            device = cache.storage.pool.device
            self._sums[key] = torch.zeros(count, dtype=torch.int64, device=device)
            self._known[key] = torch.zeros(count, dtype=torch.bool, device=device)
        return self._sums[key], self._known[key]

    def _sum(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """``[R]`` int64 of ``[R, width]`` fp32; additions wrap around."""
        width = values.shape[1]
        if width not in self._weights:
            generator = torch.Generator().manual_seed(width)
            weights = torch.randint(0, 1 << 62, (width,), generator=generator) * 2 + 1
            self._weights[width] = weights.to(values.device)
        bits = values.contiguous().view(torch.int32).long()
        return (bits * self._weights[width]).sum(dim=1) + indices * _INDEX_FACTOR

    def _finding(
        self, cache: LayerCache, rows: Rows, values: torch.Tensor, bad: torch.Tensor, label: str, expected: str, got: str
    ) -> Finding:
        first = int(bad[0])
        row = int(rows.rows[first])
        page_kind, page = page_of(self._spec, cache.layer.ratio, rows.what, row)
        return Finding(
            label=label,
            layer_id=cache.layer.layer_id,
            what=rows.what,
            owner=int(rows.owners[first]),
            index=int(rows.indices[first]),
            row=row,
            page_kind=page_kind,
            page=page,
            expected=expected,
            got=got,
            bad=len(bad),
            checked=len(rows.rows),
            rows=rows.rows[bad[:ROWS_KEPT]],
            values=values[bad[:ROWS_KEPT]],
        )
