"""Attention by FlashInfer's MLA kernel: one query is one request, and its list of rows is the request's page table.

With ``head_dim_kpe=0`` and pages of one row the kernel computes this attention but for the sink, which the log-sum-exp
brings in afterwards. Key and value are one row, and window rows and entries lie in one pool.
"""

from dataclasses import dataclass, replace

import flashinfer
import torch
from flashinfer.mla import BatchMLAPagedAttentionWrapper
from flashinfer.mla._core import get_batch_mla_module
from flashinfer.utils import MaskMode

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.memory import empty
from dsv4_kernels.row_gather.fused import row_gather
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope.fused import sink_rope
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention import device
from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.flashinfer_schedule import KNOWN_VERSIONS, OwnSchedule, Partials, check_stock_plan, read_stock_plan
from sglang_dsv4.attention.host_lengths import HostLengths, host_positions
from sglang_dsv4.attention.requirements import FLASHINFER
from sglang_dsv4.attention.row_list_kinds import FixedShape, chunks, is_in_place, longest
from sglang_dsv4.attention.sparse_prefill import LIST_MULTIPLE as PREFILL_LIST_MULTIPLE
from sglang_dsv4.attention.sparse_prefill import choose_sparse_prefill
from sglang_dsv4.attention.workspace import Workspace
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache, LayerCache, StepPlan
from sglang_dsv4.errors import UnsupportedError

_DTYPE = torch.bfloat16
# FlashMLA's prefill kernel has the sink, and the pass after it is an eighth as long, but it never shares a list out: it is
# faster for many queries, unless there are few that have long lists.
_MANY_QUERIES, _VERY_MANY_QUERIES, _LONG_LIST = 64, 512, 1280


class _StockSchedule:
    """FlashInfer's planner: on the host, from lengths that the host knows."""

    def __init__(self, floats: torch.Tensor, backend: str, fixed_tokens: int | None, lists: torch.Tensor | None) -> None:
        buffers: dict[str, object] = {}
        if fixed_tokens is not None:
            begins, counts = fixed_tokens + 1, fixed_tokens
            names = {"qo_indptr": begins, "kv_indptr": begins, "kv_len_arr": counts}
            buffers = {name: torch.zeros(count, dtype=torch.int32, device=floats.device) for name, count in names.items()}
            buffers |= {"use_cuda_graph": True, "kv_indices": lists}
        self._fixed = fixed_tokens is not None
        self.wrapper = BatchMLAPagedAttentionWrapper(floats, backend=backend, **buffers)
        self._copied: torch.cuda.Event | None = None

    def plan(self, lengths: torch.Tensor, lists: torch.Tensor, stride: int, num_heads: int, scale: float) -> None:
        """Plan queries with lists of these lengths (int32, CPU), ``stride`` apart in the flat ``lists``."""
        if self._copied is not None:
            # The last plan's copy may still be reading the pinned buffer that this one writes.
            self._copied.synchronize()
        counts = torch.arange(len(lengths) + 1, dtype=torch.int32)
        # In graph mode the wrapper copies the indices into its own buffer, which is the one that we write: none are given.
        given = lists[:0] if self._fixed else lists
        self.wrapper.plan(counts, counts * stride, given, lengths, num_heads, 512, 0, 1, False, scale, _DTYPE, _DTYPE)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def run(self, q: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend; ``lse`` gets natural logarithms."""
        self.wrapper.run(q, q[..., :0], rows, rows[..., :0], out=out, lse=lse, return_lse=True, return_lse_base_on_e=True)


@dataclass
class Chunk:
    """Queries that are attended in one launch: their lists, rows, and schedule; or lengths, for FlashMLA."""

    tokens: slice
    lists: torch.Tensor
    flat: torch.Tensor
    schedule: OwnSchedule | _StockSchedule | torch.Tensor


class FlashInferAttention(Attention):
    """Makes a schedule once per step and kind of layer, and attends with one launch, and one more for sink and rotation.

    Buffers belong to this object and are used by one stream. Without a fixed shape a step may be of any size, and a buffer
    that is too small is replaced.

    Args:
        cache (CompressedKVCache): on a CUDA device of SM80 or later, with bf16 or fp8_584 rows.
        num_heads (int): query heads.
        schedule (str): ``"own"``: on the device, capturable; ``"whole"``: the same, but no query is cut into pieces, so that its
            result has the same bits whatever the batch; few queries then take as long as the longest of them (FlashMLA's
            prefill kernel, another order of additions, is not used); ``"stock"``: FlashInfer's planner, on the host, between
            replays; ``"auto"``: own where the version of FlashInfer is known.
        backend (str): ``"fa2"``, ``"fa3"`` (SM90), or ``"auto"``.
        prefill (str): ``"flashmla"``: steps of 64 queries and more by FlashMLA's prefill kernel, which reads the same pool and
            lists (SM90, bf16 rows, 64 or 128 heads, package sgl-flash-mla); ``"flashinfer"``: all alike; ``"auto"``: FlashMLA
            where it is possible.
        fixed (FixedShape | None): the one shape of every step, for CUDA graphs.
        workspace (Workspace | None): another's, for graphs of several shapes that take turns, each planned anew at its turn;
            the largest shape is planned first. By default a new one.

    Raises:
        UnsupportedError: the device, row format or version of FlashInfer does not fit; the message says which.
    """

    name = "flashinfer"

    def __init__(
        self,
        cache: CompressedKVCache | ExternalKVCache,
        num_heads: int,
        *,
        schedule: str = "auto",
        backend: str = "auto",
        prefill: str = "auto",
        fixed: FixedShape | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(cache, bf16_heads=num_heads)
        self.num_heads = num_heads
        found = device.device_of(cache.device)
        fault = FLASHINFER.why_not(found, cache.spec.row_format, num_heads)
        if fault:
            raise UnsupportedError(f"attention flashinfer: {fault}")
        assert found.capability is not None
        hopper = found.capability[0] == 9
        if backend not in ("auto", "fa2", "fa3") or (backend == "fa3" and not hopper):
            raise UnsupportedError(f"backend: expected auto, fa2, or fa3 on SM90, got {backend!r} on {found}")
        self.backend = ("fa3" if hopper else "fa2") if backend == "auto" else backend
        if schedule not in ("auto", "own", "whole", "stock"):
            raise UnsupportedError(f"schedule: expected auto, own, whole or stock, got {schedule!r}")
        if schedule == "auto":
            schedule = "own" if flashinfer.__version__ in KNOWN_VERSIONS else "stock"
        if schedule == "whole" and prefill == "flashmla":
            raise UnsupportedError(
                "prefill flashmla: expected schedule own or stock, got whole, whose results do not depend on the batch"
            )
        if schedule != "stock" and flashinfer.__version__ not in KNOWN_VERSIONS:
            raise UnsupportedError(
                f"schedule {schedule}: expected FlashInfer {' or '.join(KNOWN_VERSIONS)}, whose plan layout is known, got "
                f"{flashinfer.__version__}"
            )
        self.schedule = schedule
        self.fixed = fixed
        self._sparse_prefill = choose_sparse_prefill(prefill, found, cache.spec.row_format, num_heads, self.sm_scale)
        self.prefill = "flashinfer" if self._sparse_prefill is None else "flashmla"
        self._packed = cache.spec.rows is FP8_584_ROW
        shared = workspace is not None  # whose first user has checked the layout of plans
        if workspace is None:
            partials = Partials(num_heads, cache.spec.head_dim, found.num_sms, self.device)
            workspace = Workspace(partials, self.device)
        elif workspace.partials.num_heads != num_heads:
            raise ValueError(f"workspace: expected one for {num_heads} heads, got {workspace.partials.num_heads}")
        self.workspace = workspace
        self._module = get_batch_mla_module(self.backend, _DTYPE, _DTYPE, _DTYPE, torch.int32, cache.spec.head_dim, 0, False)
        self._lists: dict[str, torch.Tensor] = {}
        self._schedules: dict[tuple[str, int], OwnSchedule | _StockSchedule] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        if schedule != "stock" and not shared:
            self._check_layout()

    @property
    def capture_fault(self) -> str:
        if self.schedule != "stock":
            return ""
        return (
            f"the planner of FlashInfer {flashinfer.__version__} runs on the host; expected {' or '.join(KNOWN_VERSIONS)}, "
            "whose plan can be made on the device"
        )

    @property
    def needs_host_lengths(self) -> bool:
        return self.schedule == "stock"

    def buffers(self) -> dict[int, int]:
        schedules = [found.ints for found in self._schedules.values() if isinstance(found, OwnSchedule)]
        return {held.data_ptr(): held.nbytes for held in (*self.workspace.tensors(), *schedules)}

    def begin(self, plan: StepPlan, lengths: HostLengths | None = None) -> None:
        if self.fixed is not None and plan.num_tokens != self.fixed.num_tokens:
            raise ValueError(f"begin: expected {self.fixed.num_tokens} tokens, the fixed shape, got {plan.num_tokens}")
        if self.schedule == "stock" and torch.cuda.is_current_stream_capturing():
            raise ValueError("begin: FlashInfer's planner runs on the host; expected no capture of its stream")
        self._plan = plan
        self.chunks = {kind.name: [] for kind in self.distinct_kinds}
        if plan.num_tokens == 0:
            return
        on_host = host_positions(plan, lengths) if self.schedule == "stock" else None
        for kind in self.distinct_kinds:
            self._begin_kind(kind, on_host)
        if self.fixed is not None:
            self.workspace.seal()

    def _attend(
        self, layer: LayerCache, q: torch.Tensor, sink: torch.Tensor, selected: torch.Tensor | None, undo_rope: bool
    ) -> torch.Tensor:
        q = q.contiguous()
        out = empty(tuple(q.shape), q.dtype, q.device)
        lse = empty(tuple(q.shape[:2]), torch.float32, q.device)
        pool = layer.pool
        table = layer.rope_table if undo_rope else None
        kind = self.kinds[layer.layer_id]
        for chunk in self.chunks[kind.name]:
            part, positions = chunk.tokens, self._plan.step.positions[chunk.tokens]
            if selected is not None and not is_in_place(selected, self._lists[kind.name]):
                step = self._step(part)
                row_lists(step, kind, chunk.lists, selected[part], window=False)
            if isinstance(chunk.schedule, torch.Tensor):
                assert self._sparse_prefill is not None
                values, lse[part] = self._sparse_prefill(q[part], pool, chunk.lists, chunk.schedule, sink)
                if table is not None:
                    sink_rope(values, lse[part], None, positions, table)
                if len(self.chunks[kind.name]) == 1:
                    return values
                out[part] = values
                continue
            self.attend(kind, chunk, pool, q[part], out[part], lse[part])
            splits = None
            if isinstance(chunk.schedule, OwnSchedule):
                splits = chunk.schedule.splits(part.stop - part.start)
            sink_rope(out[part], lse[part], sink, positions, table, splits)
        return out

    def selected_buffer(self, layer: LayerCache) -> torch.Tensor | None:
        kind = self.kinds[layer.layer_id]
        if kind.most is None or self._plan.num_tokens == 0:
            return None
        most = kind.width(longest(self._plan, self.fixed)) - kind.window
        return self._lists[kind.name][:, :most]

    def attend(
        self, kind: ListKind, chunk: Chunk, pool: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """FlashInfer's launch alone: no sink, rotated, and with our schedule pieces apart."""
        if self._packed:  # the chunk's listed rows as bf16, in list order
            rows = self.workspace.buffer("decoded", chunk.lists.numel() * 512, _DTYPE)
            row_gather(pool, self.spec.rows, chunk.lists, kind, self._step(chunk.tokens).positions, rows.view(-1, 512))
        else:
            rows = pool
        rows = rows.view(-1, 1, 512)
        if isinstance(chunk.schedule, _StockSchedule):
            chunk.schedule.run(q, rows, out, lse)
            return
        own = chunk.schedule
        assert isinstance(own, OwnSchedule)
        self._module.run(
            own.partials.floats,
            own.ints,
            own.plan_info,
            q,
            q[..., :0],
            rows,
            rows[..., :0],
            chunk.flat,
            out,
            lse,
            MaskMode.NON_CAUSAL.value,
            self.num_heads,
            1,
            self.sm_scale,
            True,
            1.0,
            1.0,
            None,
        )

    def _step(self, part: slice) -> StepTensors:
        step = self._plan.step
        return replace(step, positions=step.positions[part], token_rows=step.token_rows[part])

    def _begin_kind(self, kind: ListKind, on_host: torch.Tensor | None) -> None:
        num_tokens, width = self._plan.num_tokens, kind.width(longest(self._plan, self.fixed))
        sparse = self._sparse_prefill is not None and (
            num_tokens >= (_MANY_QUERIES if width <= _LONG_LIST else _VERY_MANY_QUERIES)
        )
        if sparse:
            width = -(-width // PREFILL_LIST_MULTIPLE) * PREFILL_LIST_MULTIPLE
        lists = self.workspace.buffer(f"lists {kind.name}", num_tokens * width, torch.int32).view(-1, width)
        self._lists[kind.name] = lists
        counts = None
        if sparse:
            counts = self.workspace.buffer(f"lengths {kind.name}", num_tokens, torch.int32)
        row_lists(self._plan.step, kind, lists, pad=sparse, lengths=counts)
        row_bytes = 2 * self.spec.head_dim if self._packed else 0
        for number, part in enumerate(chunks(num_tokens, width, decoded_row_bytes=row_bytes)):
            mine = lists[part]
            # A decoded row lies where its list names it: list cell ``i`` is row ``i``.
            flat = self.workspace.counting(mine.numel()) if self._packed else mine.view(-1)
            if counts is not None:
                self.chunks[kind.name].append(Chunk(part, mine, flat, counts[part]))
                continue
            if self._packed:  # what `run` will ask for
                self.workspace.buffer("decoded", mine.numel() * 512, _DTYPE)
            schedule = self._schedule(kind, number, part.stop - part.start, flat)
            if isinstance(schedule, OwnSchedule):
                schedule.plan(self._plan.step.positions[part], kind, width)
            else:
                assert on_host is not None
                lengths = kind.lengths(on_host[part]).int()
                schedule.plan(lengths, flat, width, self.num_heads, self.sm_scale)
            self.chunks[kind.name].append(Chunk(part, mine, flat, schedule))

    def _schedule(self, kind: ListKind, number: int, num_tokens: int, flat: torch.Tensor) -> OwnSchedule | _StockSchedule:
        key = (kind.name, number)
        found = self._schedules.get(key)
        if isinstance(found, OwnSchedule) and len(found.work.num_pieces) < num_tokens:
            found = None
        if found is None:
            if self.schedule != "stock":
                found = OwnSchedule(num_tokens, self.workspace.partials, self.device, self.schedule == "own")
            else:
                fixed_tokens = None if self.fixed is None else num_tokens
                found = _StockSchedule(self.workspace.partials.floats, self.backend, fixed_tokens, flat)
            self._schedules[key] = found
        return found

    def _check_layout(self) -> None:
        """Read a plan that FlashInfer's planner makes, as our own is written; raise where that fails."""
        lengths, stride = [640, 1, 0, 5000], 5003
        stock = _StockSchedule(self.workspace.partials.floats, self.backend, None, None)
        lists = torch.zeros(len(lengths) * stride, dtype=torch.int32, device=self.device)
        stock.plan(torch.tensor(lengths, dtype=torch.int32), lists, stride, self.num_heads, self.sm_scale)
        wrapper = stock.wrapper
        works = read_stock_plan(list(wrapper._plan_info), wrapper._int_workspace_buffer.cpu())
        check_stock_plan(works, lengths, stride)
