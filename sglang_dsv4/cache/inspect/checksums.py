"""I8: a checksum of every stored row, kept when it is written and compared before it is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.cache.inspect.integrity import describe, label_of
from sglang_dsv4.cache.regions import RowSet, SequenceBatch
from sglang_dsv4.cache.storage import Capacity, LayerStorage, StoredRegion

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
        index (int): of the row within its sequence, as in `sglang_dsv4.cache.regions`.
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
        layers (Sequence[LayerStorage]): the cache's memory.
        capacity (Capacity): its sizes.
    """

    def __init__(self, layers: Sequence[LayerStorage], capacity: Capacity) -> None:
        self._stored = [stored for layer in layers for stored in layer.regions]
        self._capacity = capacity
        self._sums: dict[str, torch.Tensor] = {}
        self._known: dict[str, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the checksums."""
        return sum(t.nbytes for kept in (self._sums, self._known) for t in kept.values())

    def record(self, batch: SequenceBatch, begins: list[int]) -> Finding | None:
        """Keep the sums of what a step wrote; the first row that is not finite, if there is one.

        Args:
            batch (SequenceBatch): the step's sequences after it.
            begins (list[int]): their lengths before it.
        """
        for stored in self._stored:
            found = batch.written(stored.region, begins)
            values = stored.values(found.rows)
            bad = torch.nonzero(~torch.isfinite(values).all(dim=1)).flatten()
            if len(bad):
                return self._finding(stored, found, values, bad, label_of(stored.region), "finite values", "others")
            sums, known = self._kept(stored)
            sums[found.rows] = self._sum(values, found.indices)
            known[found.rows] = True
        return None

    def verify(self, batch: SequenceBatch) -> Finding | None:
        """The first row that one of these sequences needs and that is not what was written; None if all are."""
        for stored in self._stored:
            found = batch.needed(stored.region)
            values = stored.values(found.rows)
            sums, known = self._kept(stored)
            is_known = known[found.rows]
            right = is_known & (sums[found.rows] == self._sum(values, found.indices))
            bad = torch.nonzero(~right).flatten()
            if len(bad):
                got = "another one" if bool(is_known[bad[0]]) else "a row that was never written"
                return self._finding(stored, found, values, bad, SUMS, "the checksum kept when it was written", got)
        return None

    def digests(self, batch: SequenceBatch) -> list[str]:
        """One digest per sequence of all that it needs, whichever pages and slot it lies in.

        Sequences whose rows are equal byte for byte have equal digests; rows that differ in one value have others.
        """
        hashes = [hashlib.sha256() for _ in batch.seq_lens]
        for stored in self._stored:
            found = batch.needed(stored.region)
            sums, owners = self._sum(stored.values(found.rows), found.indices).cpu(), found.owners.cpu()
            for owner, digest in enumerate(hashes):
                digest.update(stored.region.name.encode())
                digest.update(sums[owners == owner].numpy().tobytes())
        return [digest.hexdigest() for digest in hashes]

    def _kept(self, stored: StoredRegion) -> tuple[torch.Tensor, torch.Tensor]:
        region = stored.region
        if region.name not in self._sums:
            count = self._capacity.count(region.owner) * region.rows_per_owner
            self._sums[region.name] = torch.zeros(count, dtype=torch.int64, device=stored.tensor.device)
            self._known[region.name] = torch.zeros(count, dtype=torch.bool, device=stored.tensor.device)
        return self._sums[region.name], self._known[region.name]

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
        self, stored: StoredRegion, found: RowSet, values: torch.Tensor, bad: torch.Tensor, label: str, expected: str, got: str
    ) -> Finding:
        first, region = int(bad[0]), stored.region
        row = int(found.rows[first])
        return Finding(
            label=label,
            layer_id=region.layer_id,
            what=describe(region),
            owner=int(found.owners[first]),
            index=int(found.indices[first]),
            row=row,
            page_kind=region.owner.value,
            page=row // region.rows_per_owner,
            expected=expected,
            got=got,
            bad=len(bad),
            checked=len(found.rows),
            rows=found.rows[bad[:ROWS_KEPT]],
            values=values[bad[:ROWS_KEPT]],
        )
