"""A stand-in for FlashInfer 0.6.18 on a CPU: its planner and its kernel as plain loops over the same workspaces.

Written from scheduler.cuh (`MLAPlanInfo`, `MLAPlan`), batch_mla_run.cu and mla_hopper.cuh: which number lies where, which rows a
work reads and writes, what is merged. Like the kernel it reads every row of the tiles that it touches below the list's end,
and a piece that does not begin at a tile may be counted a tile too long, whose row is then row 0 of the pool.
"""

import math
import sys
import types
from enum import Enum

import torch

MAX_WORKS = 16384
TILE = 64
FIELDS = 18


class MaskMode(Enum):
    """FlashInfer's mask modes."""

    NON_CAUSAL = 0
    CAUSAL = 1


def _aligned(sizes):
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-4 * size // 16) * 16
    return offsets, total


class Module:
    """What `get_batch_mla_module` returns."""

    num_sms = 16

    def __init__(self):
        self.launches = 0

    def plan(self, ints, qo_indptr, kv_indptr, kv_len, num_heads):
        """One work per query, or two halves for the longest one; lanes in turn."""
        blocks = 2 if num_heads > 64 else 1
        lanes = self.num_sms // blocks
        works = [[] for _ in range(lanes)]
        longest, merge = int(kv_len.argmax()), [0] * 5
        for i in range(len(kv_len)):
            length, half = int(kv_len[i]), -(-int(kv_len[i]) // 128) * 64
            split = i == longest and length > half > 0
            ranges = [(0, half), (half, length)] if split else [(0, length)]
            for number, (start, end) in enumerate(ranges):
                row = number * num_heads if split else -1
                works[(i + number) % lanes].append((int(qo_indptr[i]), int(kv_indptr[i]), row, 1, length, 0, start, end))
            if split:
                merge = [i * num_heads, (i + 1) * num_heads, 0, 2 * num_heads, num_heads]
        flat = [work for lane in works for work in lane]
        assert len(flat) <= MAX_WORKS, "the sections would overrun, unnoticed"
        sizes = [MAX_WORKS] * 3 + [self.num_sms] * 5 + [MAX_WORKS] * 6
        offsets, total = _aligned(sizes)
        assert total <= len(ints)
        columns = list(zip(*flat, strict=True))
        begins = [0]
        for lane in works:
            begins.append(begins[-1] + len(lane))
        values = [*columns[:3], *([value] for value in merge), *columns[3:8], begins]
        for offset, numbers in zip(offsets, values, strict=True):
            ints[offset : offset + 4 * len(numbers)] = torch.tensor(numbers, dtype=torch.int32).view(torch.uint8)
        lse_offset = 2 * lanes * blocks * 64 * 512 * 2
        return [blocks, lanes, *offsets, 0, lse_offset]

    def run(  # noqa: PLR0913 FlashInfer's own signature
        self,
        floats,
        ints,
        plan_info,
        q,
        q_pe,
        ckv,
        kpe,
        kv_indices,
        out,
        lse,
        mask_mode,
        num_heads,
        page_size,
        sm_scale,
        base_e,
        ckv_scale,
        kpe_scale,
        ckv_scale_arr,
    ):
        """The persistent kernel."""
        assert len(plan_info) == FIELDS and all(isinstance(value, int) for value in plan_info)
        assert mask_mode == MaskMode.NON_CAUSAL.value and page_size == 1 and base_e
        assert (ckv_scale, kpe_scale, ckv_scale_arr) == (1.0, 1.0, None)
        assert q.dtype == ckv.dtype == out.dtype == torch.bfloat16 and kv_indices.dtype == torch.int32
        assert q_pe.shape[-1] == kpe.shape[-1] == 0 and ckv.shape[1:] == (1, 512)
        self.launches += 1
        blocks, lanes = plan_info[:2]
        assert blocks * lanes <= self.num_sms, "a cooperative launch needs every block on the chip at once"
        assert blocks * 64 >= num_heads
        heads = num_heads

        def section(field, count):
            offset = plan_info[field]
            assert offset % 16 == 0
            return ints[offset : offset + 4 * count].view(torch.int32)

        begins = section(15, lanes + 1).tolist()
        count = begins[-1]
        names = (2, 3, 4, 10, 11, 12, 13, 14)
        works = zip(*(section(field, count).tolist() for field in names), strict=True)
        partial = floats[plan_info[16] :]
        partial_lse = floats[plan_info[17] :].view(torch.float32)
        for query, begin, row, q_len, length, q_start, start, end in works:
            assert (q_len, q_start) == (1, 0)
            tiles = -(-end // TILE) - start // TILE
            bound = begin + length
            seen = torch.arange(begin + start, begin + start + tiles * TILE)
            listed = torch.where(seen < bound, kv_indices[seen.clamp_max(len(kv_indices) - 1)], 0)
            rows = ckv[listed.long(), 0].double()
            if tiles and not (seen[-TILE:] < bound).all():  # the last tile alone is filled with zeros
                rows[-TILE:][seen[-TILE:] >= bound] = 0.0
            logits = q[query].double() @ rows.T * sm_scale
            logits[:, seen >= begin + end] = -math.inf
            value_lse = logits.logsumexp(-1) if tiles else logits.new_full((heads,), -math.inf)
            weights = (logits - value_lse.unsqueeze(1)).exp() if end > start else logits * 0
            value = (weights.to(torch.bfloat16).double() @ rows).to(torch.bfloat16)
            if row < 0:
                out[query], lse[query] = value, value_lse.float()
                continue
            size = 2 * 512 * heads
            partial[row * 1024 : row * 1024 + size] = value.contiguous().view(torch.uint8).flatten()
            partial_lse[row : row + heads] = (value_lse / math.log(2)).float()
        self._merge(plan_info, section, partial, partial_lse, out, lse, heads, blocks * lanes)

    def _merge(self, plan_info, section, partial, partial_lse, out, lse, heads, ctas):
        ranges = zip(*(section(field, ctas).tolist() for field in range(5, 10)), strict=True)
        for first, last, begin, end, stride in ranges:
            for local in range(last - first):
                query, head = divmod(first + local, heads)
                rows = range(begin + local, end, stride)
                parts = torch.stack([partial_lse[row] for row in rows]).double()
                merged = torch.logsumexp(parts * math.log(2), 0)
                values = torch.stack([partial[1024 * r : 1024 * (r + 1)].view(torch.bfloat16) for r in rows])
                weights = (parts * math.log(2) - merged).exp()
                out[query, head] = (weights.unsqueeze(1) * values.double()).sum(0).to(out.dtype)
                lse[query, head] = merged.float()


MODULE = Module()


class BatchMLAPagedAttentionWrapper:
    """The part of the wrapper that is used."""

    made = 0

    def __init__(
        self,
        float_workspace_buffer,
        use_cuda_graph=False,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        backend="auto",
    ):
        type(self).made += 1
        assert backend in ("fa2", "fa3")
        self._floats, self._graph, self._kv_indices_buf = (float_workspace_buffer, use_cuda_graph, kv_indices)
        self._buffers = (qo_indptr, kv_indptr, kv_len_arr)
        self._int_workspace_buffer = torch.full((8 << 20,), 0xFF, dtype=torch.uint8)

    def plan(  # noqa: PLR0913 FlashInfer's own signature
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        """Plan; lengths must be on the host."""
        for tensor in (qo_indptr, kv_indptr, kv_len_arr):
            assert tensor.device.type == "cpu" and tensor.dtype == torch.int32
        assert (head_dim_ckv, head_dim_kpe, page_size, causal) == (512, 0, 1, False)
        assert len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1
        if self._graph:
            for buffer, given in zip(self._buffers, (qo_indptr, kv_indptr, kv_len_arr), strict=True):
                buffer.copy_(given)
            self._kv_indices_buf[: len(kv_indices)].copy_(kv_indices)
        else:
            self._kv_indices_buf = kv_indices
        self._scale, self._heads = sm_scale, num_heads
        self._plan_info = MODULE.plan(self._int_workspace_buffer, qo_indptr, kv_indptr, kv_len_arr, num_heads)

    def run(self, q, q_pe, ckv, kpe, out, lse, return_lse, return_lse_base_on_e):
        """Run."""
        assert return_lse
        MODULE.run(
            self._floats,
            self._int_workspace_buffer,
            self._plan_info,
            q,
            q_pe,
            ckv,
            kpe,
            self._kv_indices_buf,
            out,
            lse,
            0,
            self._heads,
            1,
            self._scale,
            return_lse_base_on_e,
            1.0,
            1.0,
            None,
        )


def install(version="0.6.18"):
    """Put the stand-in where `import flashinfer` finds it."""
    package, mla, core, utils = (
        types.ModuleType(name) for name in ("flashinfer", "flashinfer.mla", "flashinfer.mla._core", "flashinfer.utils")
    )
    package.__version__ = version
    package.mla, package.utils, mla._core = mla, utils, core
    mla.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper
    core.get_batch_mla_module = lambda *args: MODULE
    utils.MaskMode = MaskMode
    for module in (package, mla, core, utils):
        sys.modules[module.__name__] = module
