"""Checks of the selection with DeepGEMM's scores, on a GPU and, under Triton's interpreter, on a CPU.

Run as a program it makes every check on the CPU and prints ``{check: "" or its fault}``. Where DeepGEMM is not installed,
`Scorer` stands in for it.
"""

from unittest import mock

import torch

from dsv4_kernels.index_score import naive_index_scores
from dsv4_kernels.layout import FP8_INDEX
from sglang_dsv4.cache import long_scores
from tests.kernels.index_world import RATIO, K, make_world
from tests.kernels.interpreting import make_checks


class Scorer:
    """What DeepGEMM computes; what it would not accept is refused."""

    @staticmethod
    def fp8_mqa_logits(q, keys, weights, begins, ends, clean_logits, max_seqlen_k):
        assert not clean_logits and max_seqlen_k % 64 == 0 and (begins == 0).all()
        assert q.dtype == keys[0].dtype == torch.float8_e4m3fn and ends.dtype == torch.int32
        assert all(tensor.is_contiguous() for tensor in (q, *keys, weights))
        values = keys[0].float() * keys[1].unsqueeze(1)
        scores = naive_index_scores(q.float(), weights, values[:max_seqlen_k])
        entry = torch.arange(max_seqlen_k, device=q.device)
        scores = scores.masked_fill(entry >= ends.unsqueeze(1), float("nan"))
        return torch.nn.functional.pad(scores, (0, 64), value=float("nan"))  # rows are apart


def long_world(device="cpu"):
    return make_world(FP8_INDEX, ((2500, 30),), 64, device=device, exact=True, page_tokens=256, dtype=torch.bfloat16)


def check_select(device="cpu"):
    """A long prefill of one request chooses what the reference does, in pieces of as many tokens or scores as there is room
    for; a wrong weight is seen."""
    world = long_world(device)
    installed = long_scores.has_deep_gemm(torch.device(device), FP8_INDEX)
    scorer = long_scores.load_deep_gemm() if installed else Scorer
    expected = world.naive()
    for tokens, scores in ((64, 1 << 26), (7, 1 << 26), (64, 13 * world.max_entries - 1)):
        counting = mock.Mock(fp8_mqa_logits=mock.Mock(wraps=scorer.fp8_mqa_logits))
        out = torch.full((len(world.q), K), 7, dtype=torch.int32, device=device)
        arguments = (world.step, world.q, world.weights, world.pool, world.table, RATIO, out)
        with (
            mock.patch.object(long_scores, "load_deep_gemm", lambda made=counting: made),
            mock.patch.object(long_scores, "MOST_SCORES", scores),
        ):
            long_scores.select_long(*arguments, world.workspace(tokens), True, None)
        assert torch.equal(out, expected), (tokens, scores)
        pieces = [len(call.args[0]) for call in counting.fp8_mqa_logits.call_args_list]
        most = min(tokens, max(1, scores // world.max_entries), len(world.q))
        assert max(pieces) == most and sum(pieces) == len(world.q), (tokens, scores, pieces)
    world.weights[5] *= -1
    assert not torch.equal(world.naive(), expected), "a wrong weight was not seen"


CHECKS = {"select": check_select}


if __name__ == "__main__":
    make_checks(CHECKS)
