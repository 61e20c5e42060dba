"""Checks of decode graphs on a CPU: our kernels interpreted, FlashInfer's replaced by `tests.attention.flashinfer_model`.

Run as a program it makes every check and prints ``{check: "" or its fault}``.
"""

from unittest import mock

from sglang_dsv4 import env

env.set_default("SGLANG_USE_CPU_ENGINE", "1")

# Before a stand-in for FlashInfer can be found: SGLang would take it for the real one.
import sglang.srt.model_executor.runner.decode_cuda_graph_runner  # noqa: E402, F401

from dsv4_kernels.sparse_attention.bound import worst  # noqa: E402
from dsv4_kernels.step_plan.fused import step_plan  # noqa: E402
from sglang_dsv4.cache import CompressedKVCache, external  # noqa: E402
from sglang_dsv4.cache.choose_kernels import make_kernels  # noqa: E402
from sglang_dsv4.plugin.serve import step_planner  # noqa: E402
from tests.attention import flashinfer_checks  # noqa: E402
from tests.cache.driver import feed, make_spec, reachable_bytes  # noqa: E402
from tests.kernels.interpreting import make_checks  # noqa: E402
from tests.plugin import small_server  # noqa: E402

HEADS = 4
FLASHINFER = None


def triton_kernels(name, *given):
    """As `make_kernels` chooses on a GPU."""
    return make_kernels("triton", *given)


def make_attention(_, cache, heads, *, fixed=None, like=None):
    """As `sglang_dsv4.attention.make_attention` makes it where FlashInfer is installed."""
    shared = {} if like is None or fixed is None else {"workspace": like.workspace}
    return FLASHINFER.FlashInferAttention(cache, heads, fixed=fixed, **shared), ""


def cold(spec, sequence, length):
    """What a run of its own stores."""
    cache = CompressedKVCache(spec, num_pages=8, max_requests=1, kernels="triton")
    request = cache.open()
    feed(cache, [(request, sequence.inputs, length)])
    return reachable_bytes(cache, request)


def check_replays(formats, length):
    """Values and bytes of replays with padding, from a length on; and a twin a token short."""
    spec = make_spec(formats)
    server = small_server.SmallServer(spec, heads=HEADS)
    assert (server.cache.kernels.name, server.backend.attention.name) == ("triton", "flashinfer")
    one, two = (small_server.Sequence(spec, 140, seed, HEADS, "cpu") for seed in range(2))
    server.capture([4, 1])
    graphs = server.backend.graphs
    assert graphs.step(4).attention.workspace is graphs.step(1).attention.workspace
    server.assign(1, [3])
    server.assign(2, [9])
    server.step([(1, one, 0, length), (2, two, 0, 14)])
    for at in range(4):
        items = [(2, two, 14 + at, 15 + at), (1, one, length + at, length + at + 1)][at // 3 :]
        for layer_id, (out, chosen) in enumerate(server.replay(items)):
            assert not out[len(items) :].any()
            for row, item in enumerate(items):
                mine = None if chosen is None else chosen[row]
                assert worst(out[row], server.expected(layer_id, item, mine)) <= 1, (layer_id, at)
                shorter = (*item[:3], item[3] - 1)
                assert worst(out[row], server.expected(layer_id, shorter, mine)) > 1
    assert server.bytes_of(1, length + 4) == cold(spec, one, length + 4)
    assert server.bytes_of(2, 17) == cold(spec, two, 17) != cold(spec, one, 17)


# Over the ends of a CSA block, and of one of either ratio: to interpret ten tokens of a prefill takes a second.
CHECKS = {"bf16": lambda: check_replays(("bf16", "bf16"), 29), "fp8_584": lambda: check_replays(("fp8_584", "fp8"), 125)}


def main():
    """Make every check, with the stand-ins in place."""
    global FLASHINFER
    FLASHINFER = flashinfer_checks.load()
    with (
        mock.patch.object(external, "make_kernels", triton_kernels),
        mock.patch.object(step_planner, "naive_step_plan", step_plan),
        mock.patch.object(small_server, "make_attention", make_attention),
    ):
        make_checks(CHECKS)


if __name__ == "__main__":
    main()
