"""A step's plan from SGLang's own tables, and the steps that CUDA graphs replay."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors
from dsv4_kernels.step_plan import naive_step_plan, step_buffers, step_part
from sglang_dsv4.attention import Attention, FixedShape, HostLengths
from sglang_dsv4.cache import StepPlan
from sglang_dsv4.errors import StalePlanError, UnsupportedError
from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

# Rows of numbers that kernels read begin at multiples of this many int32: a launch is compiled once for all of them.
_ALIGNED = 4
# Launches that a graph keeps; each holds the tensors that it reads, so that their addresses stay theirs.
_MOST_LAUNCHES = 256

# Makes the attention of one shape; the second argument lends its buffers, and takes turns with it.
MakeAttention = Callable[[FixedShape, Attention | None], Attention]


class StepPlanner:
    """Makes plans on the device, in one launch, without asking it for anything.

    SGLang's scheduler may change its tables as soon as a step's plan is made, while the step itself is still running: so
    nothing but the plan reads them, and a plan is never part of a graph.

    Args:
        pool (CompressedTokenToKVPool): the cache, and the window slot of every token slot.
        req_to_token (torch.Tensor): ``[R, L]`` int32, the token slots of every request.
    """

    def __init__(self, pool: CompressedTokenToKVPool, req_to_token: torch.Tensor) -> None:
        self._pool = pool
        self._req_to_token = req_to_token

    @property
    def window_slots(self) -> torch.Tensor:
        """The window slot of every token slot, SGLang's table."""
        table: torch.Tensor = self._pool.full_to_swa_index_mapping
        return table

    def pages(self, num_tokens: int) -> int:
        """Pages that so many tokens take.

        Raises:
            StalePlanError: they are more than a sequence may have.
        """
        if num_tokens > self._pool.max_seq_len:
            raise StalePlanError(
                f"step: expected sequences of at most {self._pool.max_seq_len} tokens, got one of {num_tokens}"
            )
        return -(-num_tokens // self._pool.cache.spec.page_tokens)

    def buffers(self, num_requests: int, num_tokens: int, num_pages: int) -> StepTensors:
        """Tensors of a step of this size."""
        cache = self._pool.cache
        return step_buffers(
            num_requests, num_tokens, num_pages, cache.spec.page_tokens, cache.storage.num_window_rows, cache.device
        )

    def plan(self, batch: Any) -> StepPlan:
        """The plan of a batch of any mode.

        Args:
            batch (Any): SGLang's ForwardBatch.
        """
        seq_lens = batch.seq_lens
        extend_lens = torch.ones_like(seq_lens) if batch.forward_mode.is_decode() else batch.extend_seq_lens.to(seq_lens.device)
        pages = self.pages(int(batch.seq_lens_cpu.max()))
        out = self.buffers(len(seq_lens), len(batch.positions), pages)
        first_tokens = empty((len(seq_lens),), torch.int64, seq_lens.device)
        self.launch(out, first_tokens, seq_lens, extend_lens, batch.req_pool_indices)()
        return self._pool.cache.plan(out)

    def launch(
        self,
        out: StepTensors,
        first_tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_lens: torch.Tensor,
        request_rows: torch.Tensor,
    ) -> Callable[[], None]:
        """What plans into ``out`` when it is called, any number of times; arguments as
        `dsv4_kernels.step_plan.naive_step_plan` has them."""
        arguments = (out, first_tokens, seq_lens, extend_lens, request_rows, self._req_to_token, self.window_slots)
        if out.positions.is_cuda:
            from dsv4_kernels.step_plan.fused import StepPlanLaunch

            return StepPlanLaunch(*arguments)
        return partial(naive_step_plan, *arguments)


def host_lengths(batch: Any) -> HostLengths:
    """A batch's lengths as SGLang's scheduler knows them, without asking the device."""
    seq_lens = batch.seq_lens_cpu.tolist()
    if batch.forward_mode.is_decode():
        return HostLengths(seq_lens, [1] * len(seq_lens))
    return HostLengths(seq_lens, [int(count) for count in batch.extend_seq_lens_cpu])


@dataclass(frozen=True)
class GraphStep:
    """What the graph of one batch size holds addresses of.

    Attributes:
        step (StepTensors): the plan's tensors, filled again before every replay.
        attention (Attention): of this shape; its ``plan`` is part of the graph.
        launches (dict[tuple[int, ...], Callable[[], None]]): what fills the plan, by the number of requests that are no padding
            and by the addresses of its inputs, which SGLang keeps from step to step.
    """

    step: StepTensors
    attention: Attention
    launches: dict[tuple[int, ...], Callable[[], None]] = field(default_factory=dict)


class DecodeGraphs:
    """Decode steps of fixed shapes.

    A request that pads a batch has no new token: it writes nothing, and its query attends to nothing.

    Args:
        planner (StepPlanner): fills the plans.
        make (MakeAttention): makes the attention of a shape.
        max_requests (int): of the largest graph.
        max_seq_len (int): longest sequence.
        device (torch.device): where the steps run.
    """

    def __init__(
        self, planner: StepPlanner, make: MakeAttention, max_requests: int, max_seq_len: int, device: torch.device
    ) -> None:
        self._planner = planner
        self._make = make
        self._buffers = planner.buffers(max_requests, max_requests, planner.pages(max_seq_len))
        self._first_tokens = empty((max_requests,), torch.int64, device)
        # Row ``n``: n requests with one new token, then padding.
        width = -(-max_requests // _ALIGNED) * _ALIGNED
        self._extend_lens = torch.ones((max_requests + 1, width), dtype=torch.int32, device=device)
        self._extend_lens.tril_(-1)
        self._steps: dict[int, GraphStep] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the plans' buffers and of every shape's attention; buffers that shapes share are counted once."""
        step = self._buffers
        plans = (
            step.positions,
            step.token_rows,
            step.seq_lens,
            step.extend_lens,
            step.state_slots,
            step.history_pages,
            step.window_pages,
            self._first_tokens,
            self._extend_lens,
        )
        held: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in plans}
        for shape in self._steps.values():
            held |= shape.attention.buffers()
        return sum(held.values())

    def plan(self, batch: Any, num_real: int) -> GraphStep:
        """Fill the plan of a batch; the graph of its size, or what is captured next, reads it.

        Args:
            batch (Any): SGLang's ForwardBatch or its view of one, padded.
            num_real (int): requests that are no padding, the first ones.
        """
        count = batch.batch_size
        graph = self._steps.get(count) or self._new(count)
        if batch.seq_lens_cpu is not None:
            self._planner.pages(int(batch.seq_lens_cpu.max()))
        seq_lens, request_rows = batch.seq_lens, batch.req_pool_indices
        tables = (seq_lens, request_rows, self._planner.window_slots)
        key = (num_real, *(table.data_ptr() for table in tables))
        launch = graph.launches.get(key)
        if launch is None:
            if len(graph.launches) == _MOST_LAUNCHES:
                graph.launches.clear()
            launch = graph.launches[key] = self._planner.launch(
                graph.step,
                self._first_tokens[:count],
                seq_lens[:count],
                self._extend_lens[num_real, :count],
                request_rows[:count],
            )
        launch()
        return graph

    def step(self, count: int) -> GraphStep:
        """The step of a batch size that was planned."""
        return self._steps[count]

    def _new(self, count: int) -> GraphStep:
        pages = self._buffers.history_pages.shape[1]
        step = step_part(self._buffers, count, count, pages)
        shape = FixedShape(count, pages * step.page_tokens)
        # SGLang captures the largest batch first.
        largest = self._steps[max(self._steps)].attention if self._steps else None
        self._steps[count] = GraphStep(step, self._make(shape, largest))
        return self._steps[count]


def check_captured(max_requests: int, max_tokens: int, attention: Attention) -> None:
    """Refuse graphs of other steps than decode, and an attention that no graph can hold.

    Raises:
        UnsupportedError: says what, and what to do.
    """
    if max_tokens != max_requests:
        raise UnsupportedError(f"CUDA graphs: expected one token a request, got {max_tokens} tokens of {max_requests} requests")
    if attention.capture_fault:
        raise UnsupportedError(
            f"CUDA graphs: not possible with attention {attention.name}, because {attention.capture_fault}; add "
            "--disable-cuda-graph, or choose another with --dsv4-attention"
        )
