"""Decode steps of fixed shapes, which CUDA graphs replay."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors
from dsv4_kernels.step_plan import step_part
from sglang_dsv4.attention import Attention, FixedShape
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.serve.step_planner import StepPlanner

# Rows of numbers that kernels read begin at multiples of this many int32: a launch is compiled once for all of them.
_ALIGNED = 4
# Launches that a graph keeps; each holds the tensors that it reads, so that their addresses stay theirs.
_MOST_LAUNCHES = 256

# Makes the attention of one shape; the second argument lends its buffers, and takes turns with it.
MakeAttention = Callable[[FixedShape, Attention | None], Attention]


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
        plans = [tensor for tensor in vars(self._buffers).values() if isinstance(tensor, torch.Tensor)]
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*plans, self._first_tokens, self._extend_lens)}
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
