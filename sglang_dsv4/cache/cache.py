"""The compressed KV cache as one object."""

from collections.abc import Sequence

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache import integrity, report
from sglang_dsv4.cache.inputs import CompressorInput, WindowInput
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages import (
    ExternalPages,
    PageAllocator,
    PageOwner,
    PageTables,
    stack_tables,
)
from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.cache.request import Request
from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.cache.view import LayerView
from sglang_dsv4.errors import StalePlanError, UnknownRequestError
from sglang_dsv4.spec import CacheSpec


class CompressedKVCache:
    """Window rows, compressed entries, index keys and stream state of many requests.

    A step is ``plan`` (host, may fail, changes nothing), ``append`` for every part of every layer (device, cannot fail
    once it has begun), then ``commit`` (host). Between ``append`` and attention, ``view`` and ``select`` say which rows
    each new token attends to.

    With `PageAllocator` the cache owns its pages, and ``open``, ``plan``, ``commit`` and ``close`` manage requests. With
    `ExternalPages` somebody else does, and passes page tables to ``plan_tables``; there is nothing to commit.
    """

    def __init__(
        self, spec: CacheSpec, pages: PageOwner, device: torch.device | str = "cpu"
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.pages = pages
        self.storage = CacheStorage(spec, pages.capacity, self.device)
        self.layers = tuple(
            LayerCache(spec, layer, storage, self.storage.rope_tables[layer.rope])
            for layer, storage in zip(spec.layers, self.storage.layers, strict=True)
        )
        self._requests: dict[int, Request] = {}
        self._unfinished: set[int] = set()  # requests of a plan that was appended but not committed
        self._epoch = 0
        self._next_req_id = 0

    @classmethod
    def create(
        cls,
        spec: CacheSpec,
        *,
        num_pages: int,
        max_requests: int,
        num_window_pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "CompressedKVCache":
        """Make a cache that owns its pages.

        Args:
            spec (CacheSpec): from `CacheSpec.from_hf`.
            num_pages (int): history pages, of ``spec.page_tokens`` tokens each.
            max_requests (int): requests open at once.
            num_window_pages (int | None): window pages; by default as many as history pages, so that a prefill of any
                length fits in one step. Between steps a request holds at most two.
            device (torch.device | str): where the memory lives.
        """
        window_pages = num_pages if num_window_pages is None else num_window_pages
        capacity = Capacity(num_pages, window_pages, max_requests, num_pages * spec.page_tokens)
        return cls(spec, PageAllocator(capacity, spec.page_tokens), device)

    def open(self) -> Request:
        """Start an empty sequence.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
        """
        allocator = self._allocator("open")
        slot = allocator.slots.peek(0, 1)
        allocator.slots.take(slot)
        request = Request(self._next_req_id, slot[0])
        self._next_req_id += 1
        self._requests[request.req_id] = request
        self._epoch += 1
        return request

    def close(self, request: Request) -> None:
        """End a sequence and free what it holds.

        Raises:
            UnknownRequestError: not open here.
        """
        allocator = self._allocator("close")
        self._check_open(request)
        allocator.release(request.pages)
        allocator.slots.release(request.state_slot)
        del self._requests[request.req_id]
        self._unfinished.discard(request.req_id)
        self._epoch += 1

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
        allocator = self._allocator("plan")
        for request, num_new_tokens in items:
            self._check_open(request)
            if num_new_tokens < 0:
                raise ValueError(f"{request}: expected 0 or more new tokens, got {num_new_tokens}")
            if request.req_id in self._unfinished:
                raise StalePlanError(
                    f"{request}: its last plan was appended; expected commit or close, got another plan"
                )
        if len({request.req_id for request, _ in items}) != len(items):
            raise ValueError(
                f"plan: expected each request once, got {[request.req_id for request, _ in items]}"
            )
        grants = allocator.grant([(request.pages, request.seq_len + new) for request, new in items])
        planned = tuple(
            PlannedRequest(request, new, grant)
            for (request, new), grant in zip(items, grants, strict=True)
        )
        tables = stack_tables([(item.request.pages, item.grant) for item in planned], self.device)
        return StepPlan(
            step=self._step_tensors(planned, tables),
            window=self.spec.window,
            items=planned,
            epoch=self._epoch,
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
            raise TypeError(
                f"plan_tables: expected a cache over ExternalPages, got {type(self.pages).__name__}"
            )
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
        return StepPlan(step=step, window=self.spec.window)

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
            StalePlanError: the cache has moved on since ``plan``, or a part was appended already; nothing was changed.
            ValueError, TypeError: an input does not fit; nothing was changed.
        """
        cache = self._layer(layer_id)
        given = {"window": window, "main": main, "index": index}
        parts = {part: value for part, value in given.items() if value is not None}
        self._check_current(plan)
        for part, value in parts.items():
            cache.check(plan, part, value)
            if (layer_id, part) in plan.appended:
                raise StalePlanError(
                    f"layer {layer_id} {part}: expected once per step, got a second append"
                )
        self._unfinished.update(item.request.req_id for item in plan.items)
        for part, value in parts.items():
            if isinstance(value, WindowInput):
                cache.append_window(plan, value)
            else:
                cache.append_compressor(plan, part, value)
            plan.appended.add((layer_id, part))

    def view(self, layer_id: int, plan: StepPlan) -> LayerView:
        """Which rows each new token attends to in one layer."""
        return self._layer(layer_id).view(plan)

    def select(
        self, layer_id: int, plan: StepPlan, index_q: torch.Tensor, index_weights: torch.Tensor
    ) -> torch.Tensor:
        """Choose the entries each new token attends to in a CSA layer.

        Args:
            layer_id (int): a CSA layer, whose index keys of this step are appended.
            plan (StepPlan): the step.
            index_q (torch.Tensor): ``[T, heads, 128]``, index queries before RoPE and rotation, fp32 or bf16.
            index_weights (torch.Tensor): ``[T, heads]``, scales included.

        Returns:
            torch.Tensor: ``[T, K]`` int64 rows of the layer's pool, in ascending entry order, -1 where there are fewer.
        """
        return self._layer(layer_id).select(plan, index_q, index_weights)

    def commit(self, plan: StepPlan) -> None:
        """Make a step's tokens part of their sequences, and free window pages that no query can reach any more.

        Raises:
            StalePlanError: the cache has moved on, or a part of a layer was not appended; nothing was changed.
        """
        allocator = self._allocator("commit")
        self._check_current(plan)
        missing = [
            (cache.layer.layer_id, part)
            for cache in self.layers
            for part in cache.parts
            if (cache.layer.layer_id, part) not in plan.appended
        ]
        if missing and plan.num_tokens:
            raise StalePlanError(
                f"commit: expected every part of every layer appended, missing (layer, part) {missing}"
            )
        for item in plan.items:
            allocator.take(item.request.pages, item.grant)
            item.request.seq_len += item.num_new_tokens
            self._unfinished.discard(item.request.req_id)
        for item in plan.items:
            first = integrity.first_window_position(self.spec, item.request.seq_len)
            allocator.release_window(item.request.pages, first)
        self._epoch += 1

    def report(self) -> report.CacheReport:
        """Where the bytes are; equal to what is really allocated."""
        spec, counts = self.spec, self.pages.counts()
        by_pool = self.storage.bytes_by_pool()
        capacity = self.pages.capacity
        window_rows = len(self.layers) * self.storage.num_window_rows * spec.rows.row_bytes
        entries = sum(
            capacity.history_pages * (spec.page_tokens // layer.ratio) * spec.rows.row_bytes
            for layer in spec.layers
            if layer.ratio
        )
        return report.CacheReport(
            row_format=spec.row_format,
            index_format=spec.index_format,
            page_tokens=spec.page_tokens,
            max_tokens=(capacity.history_pages - capacity.reserved_pages) * spec.page_tokens,
            bytes_by_pool=by_pool,
            bytes_in_row_pools={
                "window_rows": window_rows,
                "entries": entries,
                "padding": by_pool["row_pools"] - window_rows - entries,
            },
            total_bytes=sum(by_pool.values()),
            history_bytes_per_token=spec.history_bytes_per_token(),
            window_page_bytes=report.window_page_bytes(spec),
            history_page_bytes=report.history_page_bytes(spec),
            stream_bytes_per_request=report.stream_bytes_per_request(spec),
            counts=counts,
            requests=tuple(
                report.report_request(spec, request) for request in self._requests.values()
            ),
        )

    def check_integrity(self, *, memory: bool = False) -> None:
        """Check the invariants of `sglang_dsv4.cache.integrity`.

        Args:
            memory (bool): also read everything that a request could read, and require it to be finite.

        Raises:
            CacheInvariantError: the message starts with the label of the broken invariant.
        """
        requests = tuple(self._requests.values())
        integrity.check_pages(self.spec, self._allocator("check_integrity"), requests)
        if memory:
            integrity.check_memory(self.spec, self.layers, self.storage.num_window_rows, requests)

    def _allocator(self, action: str) -> PageAllocator:
        if not isinstance(self.pages, PageAllocator):
            raise TypeError(
                f"{action}: expected a cache that owns its pages, got one over {type(self.pages).__name__}"
            )
        return self.pages

    def _layer(self, layer_id: int) -> LayerCache:
        if not 0 <= layer_id < len(self.layers):
            raise ValueError(f"layer_id: expected 0 .. {len(self.layers) - 1}, got {layer_id}")
        return self.layers[layer_id]

    def _check_open(self, request: Request) -> None:
        if self._requests.get(request.req_id) is not request:
            raise UnknownRequestError(
                f"{request}: expected a request opened by this cache and not closed"
            )

    def _check_current(self, plan: StepPlan) -> None:
        if plan.epoch != self._epoch:
            raise StalePlanError(
                f"plan: expected one made at epoch {self._epoch}, got one of epoch {plan.epoch}"
            )

    def _step_tensors(self, planned: Sequence[PlannedRequest], tables: PageTables) -> StepTensors:
        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        rows = [row for row, item in enumerate(planned) for _ in range(item.num_new_tokens)]
        positions = [
            item.request.seq_len + offset
            for item in planned
            for offset in range(item.num_new_tokens)
        ]
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
