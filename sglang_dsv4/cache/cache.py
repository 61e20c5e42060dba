"""The compressed KV cache as one object."""

from collections.abc import Sequence

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.inputs import CompressorInput, WindowInput
from sglang_dsv4.cache.inspect import integrity, report
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.ops import make_ops
from sglang_dsv4.cache.pages.allocator import ExternalPages, PageAllocator, PageOwner, PageTables, stack_tables
from sglang_dsv4.cache.pages.copy_on_write import plan_copies
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.requests import Ledger
from sglang_dsv4.cache.pages.step_undo import UndoCopies
from sglang_dsv4.cache.persist.rows import Transfer
from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.cache.sequences import CacheSequences
from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.cache.view import LayerView
from sglang_dsv4.errors import StalePlanError
from sglang_dsv4.spec import CacheSpec

CHECK_LEVELS = ("off", "pages", "memory")


class CompressedKVCache(CacheSequences):
    """Window rows, compressed entries, index keys and stream state of many requests.

    A step is ``plan`` (host, may fail, changes nothing), ``append`` for every part of every layer (device, cannot fail
    once it has begun), then ``commit`` (host), or ``abandon``, which takes all of it back. Between ``append`` and
    attention, ``view`` and ``select`` say which rows each new token attends to.

    A plan is good as long as its requests stay as they are and the pages it counts on stay free. From its first append on
    it holds its pages: whatever happens to other requests, it can be finished. Its own requests can only be closed then,
    or cut back to a snapshot.

    With `PageAllocator` the cache owns its pages, and ``open``, ``plan``, ``commit`` and ``close`` manage requests. With
    `ExternalPages` somebody else does, and passes page tables to ``plan_tables``; there is nothing to commit.
    """

    def __init__(
        self,
        spec: CacheSpec,
        pages: PageOwner,
        device: torch.device | str = "cpu",
        checks: str = "off",
        kernels: str = "auto",
        index_heads: int | None = None,
    ) -> None:
        """`create` says what the arguments are; with ``index_heads``, the indexer's scratch is allocated at once."""
        if checks not in CHECK_LEVELS:
            raise ValueError(f"checks: expected one of {CHECK_LEVELS}, got {checks!r}")
        self.spec = spec
        self.device = torch.device(device)
        self.pages = pages
        self.ops = make_ops(kernels, spec, pages.capacity, self.device, index_heads)
        self.storage = CacheStorage(spec, pages.capacity, self.device)
        self.layers = tuple(
            LayerCache(spec, layer, storage, self.storage.rope_tables[layer.rope], self.storage.num_window_rows, self.ops)
            for layer, storage in zip(spec.layers, self.storage.layers, strict=True)
        )
        self._ledger = Ledger(spec, pages) if isinstance(pages, PageAllocator) else None
        self._transfer = Transfer(spec, self.layers)
        self._checks = checks
        self._undo = UndoCopies(spec, self._stream_state())
        self._bytes_copied = dict.fromkeys(report.COPIED_BY, 0)

    @classmethod
    def create(
        cls,
        spec: CacheSpec,
        *,
        num_pages: int,
        max_requests: int,
        num_window_pages: int | None = None,
        device: torch.device | str = "cpu",
        checks: str = "off",
        kernels: str = "auto",
    ) -> "CompressedKVCache":
        """Make a cache that owns its pages.

        Args:
            spec (CacheSpec): from `CacheSpec.from_hf`.
            num_pages (int): history pages, of ``spec.page_tokens`` tokens each.
            max_requests (int): requests open at once.
            num_window_pages (int | None): window pages; by default as many as history pages, so that a prefill of any
                length fits in one step. Between steps a request holds at most two, and one more for draft tokens.
            device (torch.device | str): where the memory lives.
            checks (str): ``"pages"`` checks the books after every operation that changes them, ``"memory"`` also that all
                a request could read is finite; ``"off"`` leaves it to `check_integrity`.
            kernels (str): ``"triton"`` (a CUDA device), ``"torch"`` (anywhere), or ``"auto"``: Triton where it runs. The
                two round some entries differently, in the last bit of a stored value.
        """
        window_pages = num_pages if num_window_pages is None else num_window_pages
        capacity = Capacity(num_pages, window_pages, max_requests, num_pages * spec.page_tokens)
        return cls(spec, PageAllocator(capacity, spec.page_tokens), device, checks, kernels)

    def plan(self, items: Sequence[tuple[Request, int]]) -> StepPlan:
        """Prepare a step; changes nothing.

        Args:
            items (Sequence[tuple[Request, int]]): requests and how many new tokens each gets. The step's tokens are those
                of the first request, then those of the second, and so on.

        Raises:
            OutOfPagesError: not enough pages for all of them together.
            StalePlanError: a request's last plan was appended but not committed.
            UnknownRequestError: a request is not open here.
            ValueError: a request twice, or a negative number of tokens.
        """
        planned = self.ledger.grant(items)
        tables = stack_tables([(item.request.pages, item.grant) for item in planned], self.device)
        return StepPlan(
            step=self._step_tensors(planned, tables),
            window=self.spec.window,
            items=planned,
            epoch=self.ledger.epoch,
            owner=self,
            copies=plan_copies(self.spec, planned, self.device),
        )

    def plan_tables(
        self,
        *,
        positions: torch.Tensor,
        token_rows: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_lens: torch.Tensor,
        state_slots: torch.Tensor,
        tables: PageTables,
    ) -> StepPlan:
        """Prepare a step over pages that somebody else owns; arguments as in `dsv4_kernels.step.StepTensors`.

        A sequence may start only at a page boundary, with all earlier pages complete. Its state slot needs no reset.
        """
        if not isinstance(self.pages, ExternalPages):
            raise TypeError(f"plan_tables: expected a cache over ExternalPages, got {type(self.pages).__name__}")
        step = StepTensors(
            positions=positions.long(),
            token_rows=token_rows.long(),
            seq_lens=seq_lens.long(),
            extend_lens=extend_lens.long(),
            state_slots=state_slots.long(),
            history_pages=tables.history,
            window_pages=tables.window,
            page_tokens=self.spec.page_tokens,
            num_window_rows=self.storage.num_window_rows,
        )
        return self.plan_step(step)

    def plan_step(self, step: StepTensors) -> StepPlan:
        """Prepare a step over pages that somebody else owns, whose tensors are filled already; as `plan_tables`."""
        if not isinstance(self.pages, ExternalPages):
            raise TypeError(f"plan_step: expected a cache over ExternalPages, got {type(self.pages).__name__}")
        return StepPlan(step=step, window=self.spec.window, owner=self)

    def append(
        self,
        layer_id: int,
        plan: StepPlan,
        *,
        window: WindowInput | None = None,
        main: CompressorInput | None = None,
        index: CompressorInput | None = None,
    ) -> None:
        """Write one layer's share of a step; parts may come in one call or in several, each once per step.

        Args:
            layer_id (int): index in ``spec.layers``.
            plan (StepPlan): the step.
            window (WindowInput | None): the K=V projection.
            main (CompressorInput | None): the compressor's projections; CSA and HCA layers.
            index (CompressorInput | None): the indexer's compressor's projections; CSA layers.

        Raises:
            StalePlanError: what the plan rests on has changed, or a part was appended already; nothing was changed.
            ValueError, TypeError: an input does not fit; nothing was changed.
        """
        cache = self._layer(layer_id)
        given = {"window": window, "main": main, "index": index}
        parts = {part: value for part, value in given.items() if value is not None}
        self._check_current(plan)
        for part, value in parts.items():
            cache.check(plan, part, value)
            if (layer_id, part) in plan.appended:
                raise StalePlanError(f"layer {layer_id} {part}: expected once per step, got a second append")
        if plan.items:
            self._begin(plan)
        if plan.copies is not None and not any(done == layer_id for done, _ in plan.appended):
            self._bytes_copied["copy_on_write"] += cache.copy_shared(plan.copies)
        cache.append(plan, parts)
        plan.appended.update((layer_id, part) for part in parts)

    def view(self, layer_id: int, plan: StepPlan) -> LayerView:
        """Which rows each new token attends to in one layer."""
        self._check_current(plan)
        return self._layer(layer_id).view(plan)

    def select(
        self,
        layer_id: int,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None = None,
        numbering: StepTensors | None = None,
    ) -> torch.Tensor:
        """Choose the entries each new token attends to in a CSA layer.

        Args:
            layer_id (int): a CSA layer, whose index keys of this step are appended.
            plan (StepPlan): the step.
            index_q (torch.Tensor): ``[T, heads, 128]``, index queries before RoPE and rotation, fp32 or bf16.
            index_weights (torch.Tensor): ``[T, heads]``; a positive factor common to all chooses the same.
            out (torch.Tensor | None): ``[T, K]`` int32, to write into: of `Attention.selected_buffer`. Cells behind the entries
                are left alone then.
            numbering (StepTensors | None): `Attention.numbering` of the attention that reads the result: the chosen entries are
                numbered by this step's tables, of the same requests, instead of the pool's.

        Returns:
            torch.Tensor: ``out``, or ``[T, K]`` int64 or (Triton) int32 rows of the layer's pool, or of the numbering, in
            ascending entry order, then -1.
        """
        self._check_current(plan)
        if plan.num_tokens and (layer_id, "index") not in plan.appended:
            raise StalePlanError(f"layer {layer_id}: expected its index keys appended before select, got none")
        return self._layer(layer_id).select(plan, index_q, index_weights, out, numbering)

    def commit(self, plan: StepPlan) -> None:
        """Make a step's tokens part of their sequences, and free window pages that no query can reach any more.

        Raises:
            StalePlanError: what the plan rests on has changed, or a part of a layer was not appended; nothing was changed.
        """
        ledger = self.ledger
        self._check_current(plan)
        missing = [
            (cache.layer.layer_id, part)
            for cache in self.layers
            for part in cache.parts
            if (cache.layer.layer_id, part) not in plan.appended
        ]
        if missing and plan.num_tokens:
            raise StalePlanError(f"commit: expected every part of every layer appended, missing (layer, part) {missing}")
        self._begin(plan)
        ledger.commit(plan)
        self._after()

    def abandon(self, plan: StepPlan) -> None:
        """Take back a step that will not be committed: its requests go on from their committed lengths, exactly.

        For a step that failed, was interrupted, or lost one of its requests half way. A request that got no more tokens than
        ``max_draft_tokens`` can afterwards be rolled back as if they had come and been cut off; any other one as before.
        A plan of which nothing was appended needs no taking back; this does nothing then.

        Raises:
            StalePlanError: it was committed or abandoned, or all its requests are closed; nothing was changed.
        """
        self._check_owner(plan)
        if not plan.appended:
            return
        for item in self.ledger.abandon(plan):
            if not self._undo.put_back(plan, item):
                self.ledger.narrow(item)
        self._after()

    def report(self) -> report.CacheReport:
        """Where the bytes are; equal to what is really allocated."""
        beside = {"undo": self._undo.nbytes, "scratch": self.ops.nbytes}
        return report.build_report(self.spec, self.storage, self.pages, self._ledger, beside, self._bytes_copied)

    def check_integrity(self, *, memory: bool = False) -> None:
        """Check the invariants of `sglang_dsv4.cache.inspect.integrity`.

        Args:
            memory (bool): also read everything that a request could read, and require it to be finite.

        Raises:
            CacheInvariantError: the message starts with the label of the broken invariant.
        """
        ledger = self.ledger
        requests = ledger.requests
        integrity.check_pages(self.spec, ledger.allocator, requests, ledger.snapshots, ledger.grants)
        if memory:
            integrity.check_memory(self.spec, self.layers, requests)

    def _layer(self, layer_id: int) -> LayerCache:
        if not 0 <= layer_id < len(self.layers):
            raise ValueError(f"layer_id: expected 0 .. {len(self.layers) - 1}, got {layer_id}")
        return self.layers[layer_id]

    def _check_owner(self, plan: StepPlan) -> None:
        if plan.owner is not self:
            raise StalePlanError("plan: expected one of this cache, got another cache's")

    def _check_current(self, plan: StepPlan) -> None:
        self._check_owner(plan)
        if self._ledger is not None:
            self._ledger.check_plan(plan)

    def _begin(self, plan: StepPlan) -> None:
        """Before a step's first write: hold its pages, and what `abandon` will need."""
        if not self.ledger.is_begun(plan):
            self._bytes_copied["undo"] += self._undo.keep(plan)
            self.ledger.begin(plan)

    def _after(self, copied_state_by: str | None = None) -> None:
        """Count a copy of one request's stream state, and check what the user asked to have checked."""
        if copied_state_by is not None:
            self._bytes_copied[copied_state_by] += report.stream_bytes_per_request(self.spec)
        self._undo.drop_all_but(self.ledger.steps)
        if self._checks != "off":
            self.check_integrity(memory=self._checks == "memory")

    def _step_tensors(self, planned: Sequence[PlannedRequest], tables: PageTables) -> StepTensors:
        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        rows = [row for row, item in enumerate(planned) for _ in range(item.num_new_tokens)]
        positions = [item.request.seq_len + offset for item in planned for offset in range(item.num_new_tokens)]
        return StepTensors(
            positions=tensor(positions),
            token_rows=tensor(rows),
            seq_lens=tensor([item.request.seq_len + item.num_new_tokens for item in planned]),
            extend_lens=tensor([item.num_new_tokens for item in planned]),
            state_slots=tensor([item.request.state_slot for item in planned]),
            history_pages=tables.history,
            window_pages=tables.window,
            page_tokens=self.spec.page_tokens,
            num_window_rows=self.storage.num_window_rows,
        )
