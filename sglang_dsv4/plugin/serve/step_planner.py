"""A step's plan from SGLang's own tables."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors
from dsv4_kernels.step_plan import naive_step_plan, step_buffers
from sglang_dsv4.attention import HostLengths
from sglang_dsv4.cache import StepPlan
from sglang_dsv4.errors import StalePlanError
from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool


def batch_lengths(batch: Any) -> HostLengths:
    """A batch's lengths as SGLang's scheduler knows them, without asking the device."""
    seq_lens = batch.seq_lens_cpu.tolist()
    if batch.forward_mode.is_decode():
        return HostLengths(seq_lens, [1] * len(seq_lens))
    return HostLengths(seq_lens, [int(count) for count in batch.extend_seq_lens_cpu])


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
