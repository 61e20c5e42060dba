"""What a step of the backend launches, and how many of our functions lie between SGLang's call and a launch.

Kernels get their arguments and are not launched; FlashInfer and FlashMLA are replaced by modules that count.
"""

import importlib
import sys
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsv4_kernels
import sglang_dsv4
from dsv4_kernels.step_plan import naive_step_plan
from sglang_dsv4.attention import decoded_prefill, device, flashinfer_schedule
from tests.attention import flashinfer_model
from tests.cache.driver import make_spec
from tests.plugin import small_server
from tests.plugin.small_server import Sequence, SmallServer

pytestmark = pytest.mark.sglang

MOST_FRAMES = 5
HEADS = 64
OURS = tuple(str(Path(package.__file__).parent) for package in (sglang_dsv4, dsv4_kernels))
# Stand-ins, and modules that know them once they are imported.
STOOD_IN = (
    *("flash_mla", "flashinfer", "flashinfer.mla", "flashinfer.mla._core", "flashinfer.utils"),
    *(f"sglang_dsv4.attention.{name}" for name in ("flashinfer", "flashmla", "sparse_prefill")),
)
# Launches of a step of a window-only, a CSA and an HCA layer, but for those of the attention.
STEP = {"step_plan": 1, "row_lists": 3, "window_store": 3, "flush_csa": 1, "flush_hca": 1}
SELECT = {"index_query": 1, "index_scores": 1, "topk_entries": 1}


class Launches:
    """Counts launches, and remembers the stack of each."""

    def __init__(self):
        self.counts, self.stacks = Counter(), {}

    def add(self, name):
        frame, stack = sys._getframe(2), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(OURS):
                stack.append(f"{Path(frame.f_code.co_filename).parent.name}.{frame.f_code.co_name}")
            frame = frame.f_back
        self.counts[name] += 1
        if len(stack) > len(self.stacks.get(name, ())):
            self.stacks[name] = stack

    def take(self):
        """The counts since the last call."""
        found, self.counts = dict(self.counts), Counter()
        return found


class FlashMLA(types.ModuleType):
    """Its functions, which attend to nothing."""

    def __init__(self, launches):
        super().__init__("flash_mla")

        def decode(q, *_, **__):
            launches.add("attend")
            return q, q.new_zeros(q.shape[:-1]).transpose(1, 2)

        def prefill(q, *_, **__):
            launches.add("attend")
            return q, None, q.new_zeros(q.shape[:-1])

        self.get_mla_metadata = lambda: (object(), None)
        self.flash_mla_with_kvcache, self.flash_mla_sparse_fwd = decode, prefill


@pytest.fixture
def launches(monkeypatch):
    """A recorder in the place of all launches, and of the stand-ins' attention."""
    from triton.runtime.jit import JITFunction

    from dsv4_kernels.step_plan import fused
    from sglang_dsv4.cache import external, triton_kernels
    from sglang_dsv4.plugin.serve import step_planner

    found = Launches()

    def plan(*given):
        fused.step_plan(*given)
        naive_step_plan(*given)  # whose numbers the host's part of long steps needs

    def run(kernel, *_, **__):
        found.add(kernel.__name__.removesuffix("_kernel"))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(external, "make_kernels", lambda _, *given: triton_kernels.TritonKernels(*given))
    monkeypatch.setattr(step_planner, "naive_step_plan", plan)
    monkeypatch.setattr(device, "device_of", lambda place: device.Device(place, (9, 0), flashinfer_model.Module.num_sms))
    monkeypatch.setattr(flashinfer_schedule, "naive_mla_schedule", flashinfer_schedule.mla_schedule)
    monkeypatch.setattr(flashinfer_model.MODULE, "run", lambda *_: found.add("attend"), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=int, synchronize=int))
    kept = {name: sys.modules.pop(name, None) for name in STOOD_IN}
    sys.modules["flash_mla"] = FlashMLA(found)
    flashinfer_model.install()
    yield found
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def make_server(name, monkeypatch, formats):
    """A server with FlashMLA's attention or FlashInfer's."""
    module = importlib.import_module(f"sglang_dsv4.attention.{name}")
    kind = module.FlashMLAAttention if name == "flashmla" else module.FlashInferAttention

    def make(_, cache, heads, *, fixed=None, like=None):
        shared = {"workspace": like.workspace} if name == "flashinfer" and like is not None else {}
        return kind(cache, heads, fixed=fixed, **shared), ""

    monkeypatch.setattr(small_server, "make_attention", make)
    server = SmallServer(make_spec(formats), heads=HEADS, max_tokens=8)
    server.assign(1, [3, 5])
    return server


def check_frames(launches):
    for name, stack in launches.stacks.items():
        assert len(stack) <= MOST_FRAMES, f"{name}: {len(stack)} of our functions, from the launch out: {stack}"


@pytest.mark.parametrize(
    ("name", "formats", "attention"),
    [
        ("flashmla", ("fp8_584", "fp8"), {"attend": 3}),
        ("flashinfer", ("bf16", "bf16"), {"attend": 3, "mla_schedule": 3, "sink_rope": 3}),
        ("flashinfer", ("fp8_584", "fp8"), {"attend": 3, "mla_schedule": 3, "sink_rope": 3, "row_gather": 3}),
    ],
    ids=["flashmla", "flashinfer", "flashinfer-packed"],
)
def test_a_step_takes_few_launches_and_each_few_frames(launches, monkeypatch, name, formats, attention):
    server = make_server(name, monkeypatch, formats)
    sequence = Sequence(server.spec, 8, heads=HEADS)
    launches.take()
    expected = {**STEP, **SELECT, **attention}
    first = {**expected, "flush_csa": 2}  # the model has not passed the main compressor before its indexer's call
    for begin, end, decode, found in ((0, 6, False, first), (6, 7, True, expected), (7, 8, True, expected)):
        server.step([(1, sequence, begin, end)], decode=decode)
        assert launches.take() == found
    server.capture([2])
    launches.take()
    server.replay([(1, sequence, 7, 8)])
    assert launches.take() == {**expected, "flush_csa": 2}
    assert set(launches.stacks) == set(expected)
    check_frames(launches)


@pytest.mark.parametrize(("where", "eager", "graph"), [("never", 2, 2), ("eager", 1, 2), ("always", 1, 1)])
def test_where_main_and_indexer_take_one_launch(launches, monkeypatch, where, eager, graph):
    from sglang_dsv4.plugin.serve import backend

    monkeypatch.setattr(backend, "ONE_LAUNCH", where)
    server = make_server("flashmla", monkeypatch, ("fp8_584", "fp8"))
    sequence = Sequence(server.spec, 8, heads=HEADS)
    server.step([(1, sequence, 0, 6)])
    launches.take()
    server.step([(1, sequence, 6, 7)], decode=True)
    assert launches.take()["flush_csa"] == eager
    server.capture([1])
    launches.take()
    server.replay([(1, sequence, 7, 8)])
    assert launches.take()["flush_csa"] == graph


def test_long_steps_of_packed_rows_take_few_frames(launches, monkeypatch):
    """Rows decoded once, and scores by DeepGEMM."""
    from sglang_dsv4.cache import long_scores, triton_kernels

    monkeypatch.setattr(decoded_prefill, "FEWEST_TOKENS", 4)
    monkeypatch.setattr(triton_kernels, "is_worthwhile", lambda *_: True)

    def scores(query, keys, *_, max_seqlen_k, **__):
        launches.add("scores")
        return torch.zeros(len(query), max_seqlen_k)

    monkeypatch.setattr(long_scores, "load_deep_gemm", lambda: SimpleNamespace(fp8_mqa_logits=scores))
    server = make_server("flashmla", monkeypatch, ("fp8_584", "fp8"))
    server.cache.kernels._has_deep_gemm = True
    launches.take()
    server.step([(1, Sequence(server.spec, 8, heads=HEADS), 0, 8)])
    names = {"page_decode", "attend", "group_maxima", "scores", "index_query", "topk_entries"}
    assert names <= set(launches.take())
    check_frames(launches)
