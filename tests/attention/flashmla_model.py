"""FlashMLA's two kernels as they are documented, in fp64 on a CPU; what they would not accept is refused."""

import sys
import types

import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows


def _attend(q, rows, used, sink, scale):
    """One query over ``rows[used]``: ``[H, 512]`` with the sink, and the natural log-sum-exp without it."""
    listed = rows(used[used >= 0].long()).double()
    logits = q.double() @ listed.T * scale
    weights = torch.cat([logits, sink.double().unsqueeze(1)], 1).softmax(1)[:, :-1]
    return weights @ listed, logits.logsumexp(1)


def _attend_all(q, rows, num_rows, lists, lengths, sink, scale, multiple):
    tokens, width = lists.shape
    assert lists.dtype == lengths.dtype == torch.int32 and sink.dtype == torch.float32
    assert width % multiple == 0 and lengths.shape == (tokens,) and len(q) == tokens
    assert (lengths >= 1).all() and (lengths <= width).all(), lengths
    behind = torch.arange(width) >= lengths.unsqueeze(1)
    assert (lists[behind] == -1).all() and lists.min() >= -1 and lists.max() < num_rows
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[:2])
    for token in range(tokens):
        used = lists[token, : int(lengths[token])]
        values, lse[token] = _attend(q[token], rows, used, sink, scale)
        out[token] = values.to(q.dtype)
    return out, lse


class Model:
    """Stands in for the package.

    Attributes:
        prefills (int): launches of the prefill kernel so far.
        decodes (int): launches of the decode kernel.
    """

    prefills = decodes = 0

    @staticmethod
    def get_mla_metadata():
        """A schedule that nobody reads."""
        return object(), None

    @classmethod
    def flash_mla_sparse_fwd(cls, q, kv, lists, scale, dim, sink, lengths, *, use_legacy):
        """The prefill kernel."""
        assert use_legacy and dim == 512 and kv.dtype == torch.bfloat16 and kv.shape[1] == 1
        cls.prefills += 1
        rows = kv.squeeze(1)
        args = (rows.__getitem__, len(rows), lists.squeeze(1), lengths, sink, scale, 128)
        out, lse = _attend_all(q, *args)
        return out, None, lse

    @classmethod
    def flash_mla_with_kvcache(cls, *given, topk_length, use_legacy, kv_format):
        """The decode kernel over packed pages."""
        q, pages, table, cache_lens, dim, meta, splits, scale, causal, is_fp8, lists, sink = given
        assert (table, cache_lens, splits, causal, is_fp8) == (None, None, None, False, True)
        assert use_legacy and kv_format == "V4" and dim == 512 and meta is not None
        cls.decodes += 1
        fmt = FP8_584_ROW
        pool = pages.as_strided((len(pages), fmt.group_bytes), (fmt.group_bytes, 1))

        def rows(slots):
            return naive_load_rows(pool, slots, fmt)

        count = len(pages) * fmt.group_rows
        args = (rows, count, lists.squeeze(1), topk_length, sink, scale, 64)
        out, lse = _attend_all(q.squeeze(1), *args)
        return out.unsqueeze(1), lse.unsqueeze(2)


def install():
    """Put the stand-in where `import flash_mla` finds it."""
    package = types.ModuleType("flash_mla")
    for name in ("get_mla_metadata", "flash_mla_sparse_fwd", "flash_mla_with_kvcache"):
        setattr(package, name, getattr(Model, name))
    sys.modules["flash_mla"] = package
