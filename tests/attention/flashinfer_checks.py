"""Checks of `FlashInferAttention` on a CPU: our kernels interpreted, FlashInfer's replaced by `flashinfer_model`.

Run as a program it makes every check and prints ``{check: "" or its fault}``: both replacements must be in place before the
modules are imported.
"""

import sys
from dataclasses import replace

import torch

from dsv4_kernels.sparse_attention.bound import exact, worst
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention import EagerAttention, FixedShape, device, row_list_kinds
from sglang_dsv4.cache import Capacity, ExternalKVCache
from sglang_dsv4.check.attention_work import AttentionCase, AttentionWork, fill
from sglang_dsv4.errors import UnsupportedError
from tests.attention import flashinfer_model
from tests.cache.driver import make_spec
from tests.kernels.interpreting import make_checks

SCALE = 512**-0.5


class Event:
    """Counts the waits for a planner's copy."""

    waits = 0

    def record(self):
        """Nothing to record on a CPU."""

    def synchronize(self):
        """One wait."""
        type(self).waits += 1


def load():
    """The module, as if on an SM90 with as many multiprocessors as the model has."""
    flashinfer_model.install()
    device.device_of = lambda place: device.Device(place, (9, 0), flashinfer_model.Module.num_sms)
    torch.cuda.Event = Event
    torch.cuda.is_current_stream_capturing = lambda: False
    from sglang_dsv4.attention import flashinfer

    return flashinfer


FLASHINFER = None


def make_work(kind, heads=8, row_format="bf16", starts=(1000, 300, 5), extends=(3, 1, 2)):
    return AttentionWork(AttentionCase(kind, starts, extends, heads, 64), 2, row_format, torch.device("cpu"))


def errors(work, out, layer_id, queries=None):
    table = work.cache.layers[layer_id].rope_table
    found = []
    for query in range(len(out)) if queries is None else queries:
        angles = table[work.plan.step.positions[query]]
        rows = work.rows(layer_id, query)
        found.append(worst(out[query], exact(work.q[layer_id][query], rows, work.sink, SCALE, angles)))
    return found


def check_values():
    """Every kind, format and schedule, few and many heads; a shifted selection is noticed."""
    for kind, row_format in (("window", "bf16"), ("csa", "bf16"), ("csa", "fp8_584"), ("hca", "bf16")):
        for heads in (8, 128) if (kind, row_format) == ("csa", "bf16") else (8,):
            work = make_work(kind, heads, row_format)
            for schedule in ("own", "stock"):
                attention = FLASHINFER.FlashInferAttention(work.cache, heads, schedule=schedule)
                attention.begin(work.plan, work.lengths)
                for i in (1, 0) if heads == 8 else (1,):
                    out = attention.run(work.cache.layers[i], work.q[i], work.sink, work.selected[i], undo_rope=True)
                    assert max(errors(work, out, i)) <= 1, (kind, row_format, heads, schedule)
                if kind == "csa" and heads == 8:
                    wrong = work.selected[0].roll(1, 0)
                    out = attention.run(work.cache.layers[0], work.q[0], work.sink, wrong, undo_rope=True)
                    assert max(errors(work, out, 0)) > 1, "other queries' entries went unnoticed"


def check_chunks():
    """A prefill cut into chunks, each with its own plan."""
    kept, row_list_kinds.MAX_CHUNK_TOKENS = row_list_kinds.MAX_CHUNK_TOKENS, 7
    try:
        for kind in ("csa", "hca"):
            work = make_work(kind, starts=(250, 0), extends=(10, 9), heads=4)
            for schedule in ("own", "stock"):
                attention = FLASHINFER.FlashInferAttention(work.cache, 4, schedule=schedule)
                attention.begin(work.plan, work.lengths)
                launches = flashinfer_model.MODULE.launches
                out = attention.run(work.cache.layers[1], work.q[1], work.sink, work.selected[1], undo_rope=True)
                assert flashinfer_model.MODULE.launches == launches + 3
                assert max(errors(work, out, 1)) <= 1, (kind, schedule)
    finally:
        row_list_kinds.MAX_CHUNK_TOKENS = kept


def check_fixed_shape():
    """Padded steps of one shape: buffers stay where they are, and the planner waits for its last copy."""
    fixed = FixedShape(8, 1280)
    for schedule in ("own", "stock"):
        work = make_work("csa")
        step = work.plan.step
        padded = replace(
            step,
            positions=torch.cat([step.positions, torch.tensor([-1, -1])]),
            token_rows=torch.cat([step.token_rows, torch.zeros(2, dtype=torch.int64)]),
        )
        plan = replace(work.plan, step=padded)
        q = torch.cat([work.q[0], torch.full((2, 8, 512), float("nan"), dtype=torch.bfloat16)])
        selected = torch.cat([work.selected[0], torch.full((2, 64), -1, dtype=torch.int32)])
        attention = FLASHINFER.FlashInferAttention(work.cache, 8, schedule=schedule, fixed=fixed)
        kept, waits = [], Event.waits
        for _ in range(2):
            attention.begin(plan, work.lengths)
            out = attention.run(work.cache.layers[0], q, work.sink, selected, undo_rope=True)
            assert max(errors(work, out[:6], 0)) <= 1 and not out[6:].any()
            kept.append([chunk.flat.data_ptr() for chunk in attention.chunks["csa"]])
        assert kept[0] == kept[1]
        assert Event.waits - waits == (1 if schedule == "stock" else 0)
        check_workspace(work, attention, plan)
        refused(lambda a=attention, w=work: a.begin(w.plan), ValueError, "expected 8 tokens, the fixed shape, got 6")


def check_all_kinds_share_a_workspace():
    """A window-only, a CSA and an HCA layer of packed rows: all buffers are made by the first plan of a fixed shape."""
    spec = make_spec(("fp8_584", "fp8"))
    cache = ExternalKVCache(spec, Capacity(8, 8, 4, 1024))
    for layer in cache.layers:
        fill(layer.pool, spec.rows, torch.Generator().manual_seed(1))
    table = torch.arange(8).view(2, 4)
    attention = FLASHINFER.FlashInferAttention(cache, 4, fixed=FixedShape(3, 1024))
    for positions in ([5, 700, -1], [900, 255, 3]):
        plan = cache.plan(
            StepTensors(
                positions=torch.tensor(positions),
                token_rows=torch.tensor([0, 1, 0]),
                seq_lens=torch.tensor([901, 701]),
                extend_lens=torch.tensor([2, 1]),
                state_slots=torch.tensor([0, 1]),
                history_pages=table,
                window_pages=table,
                page_tokens=cache.spec.page_tokens,
                num_window_rows=cache.storage.num_window_rows,
            )
        )
        attention.begin(plan)
        eager = EagerAttention(cache)
        eager.begin(replace(plan, step=replace(plan.step, positions=plan.step.positions.clamp_min(0))))
        q, sink = torch.randn(3, 4, 512).bfloat16(), torch.randn(4)
        chosen = eager._plan.rows.entries(eager._plan.rows.visible_entries(4)[:, :16], 4)
        for layer_id, selected in ((0, None), (1, chosen), (2, None)):
            found = attention.run(cache.layers[layer_id], q, sink, selected, undo_rope=True)
            expected = eager.run(cache.layers[layer_id], q.float(), sink, selected, undo_rope=True)
            for query, position in enumerate(positions):
                if position < 0:
                    assert not found[query].any()
                    continue
                # Weights of at most 160 rows and two roundings to bf16, relative to the largest value.
                allowed = 2.0**-6 * expected[query].abs().max()
                assert (found[query] - expected[query]).abs().max() <= allowed, (layer_id, query)


def check_workspace(work, attention, plan):
    """A smaller shape can use the workspace of a larger one; a larger one is refused, since graphs hold the addresses."""
    make, shared = FLASHINFER.FlashInferAttention, attention.workspace
    place = attention.chunks["csa"][0].flat.data_ptr()
    smaller = make(work.cache, 8, fixed=FixedShape(6, 1280), workspace=shared)
    smaller.begin(work.plan)
    assert smaller.chunks["csa"][0].flat.data_ptr() == place
    larger = make(work.cache, 8, fixed=FixedShape(8, 1 << 20), workspace=shared)
    larger.begin(plan)  # a window and 64 entries, as before
    refused(lambda: shared.buffer("lists csa", 1 << 20, torch.int32), ValueError, "plan the largest shape first")
    refused(lambda: make(work.cache, 16, workspace=shared), ValueError, "workspace: expected one for 16 heads, got 8")


def refused(call, kind, text):
    """Raise unless the call is refused with these words."""
    try:
        call()
    except kind as fault:
        assert text in str(fault), str(fault)
    else:
        raise AssertionError(f"taken: {text}")


def check_refusals():
    """What cannot be done is refused before anything is launched."""
    work = make_work("csa")
    make = FLASHINFER.FlashInferAttention
    for options, text in (({"schedule": "stock"}, ""), ({"backend": "fa4"}, "backend: expected auto, fa2, or fa3 on SM90")):
        if text:
            refused(lambda o=options: make(work.cache, 8, **o), UnsupportedError, text)
            continue
        attention = make(work.cache, 8, **options)
        refused(lambda a=attention: a.begin(work.plan), ValueError, "expected the lengths of a step over external pages")
    refused(lambda: make(work.cache, 129), UnsupportedError, "expected 1 .. 128 query heads, got 129")
    exact_rows = make_work("csa", row_format="fp32")
    refused(lambda: make(exact_rows.cache, 8), UnsupportedError, "expected bf16 or fp8_584 rows, got fp32")
    attention = make(work.cache, 8)
    attention.begin(work.plan)
    launches = flashinfer_model.MODULE.launches
    q, sink, selected = work.q[0], work.sink, work.selected[0]
    refused(
        lambda: attention.run(work.cache.layers[0], q.float(), sink, selected),
        ValueError,
        "expected bfloat16 [T, 8, 512], got torch.float32",
    )
    refused(lambda: attention.run(work.cache.layers[0], q[:, :4], sink, selected), ValueError, "expected bfloat16 [T, 8, 512]")
    refused(
        lambda: attention.run(work.cache.layers[0], q[:2], sink, selected), ValueError, "layer 0 q: expected 6 tokens, got 2"
    )
    refused(
        lambda: attention.run(work.cache.layers[0], q, sink),
        ValueError,
        "expected selected rows exactly in CSA layers, got none",
    )
    refused(
        lambda: attention.run(work.cache.layers[0], q, sink, selected[:3]),
        ValueError,
        "selected rows: expected 6 tokens, got 3",
    )
    assert flashinfer_model.MODULE.launches == launches


def check_versions():
    """Our schedule is for versions whose layout is known; another layout is found out, another version uses its own planner."""
    work, make, package = make_work("window"), FLASHINFER.FlashInferAttention, FLASHINFER.flashinfer
    package.__version__ = "0.6.19"
    try:
        assert make(work.cache, 8).schedule == "stock"
        refused(lambda: make(work.cache, 8, schedule="own"), UnsupportedError, "whose plan layout is known, got 0.6.19")
    finally:
        package.__version__ = "0.6.18"
    plan = flashinfer_model.Module.plan
    try:
        flashinfer_model.Module.plan = lambda *args: plan(*args)[:-1]
        refused(lambda: make(work.cache, 8), ValueError, "expected 18 numbers, got 17")
        flashinfer_model.Module.plan = lambda *args: _swapped(plan(*args))
        refused(lambda: make(work.cache, 8), ValueError, "FlashInfer's plan: ")
    finally:
        flashinfer_model.Module.plan = plan
    assert make(work.cache, 8).schedule == "own"


def _swapped(info):
    """A layout in which where pieces begin and end changed places."""
    info[13], info[14] = info[14], info[13]
    return info


CHECKS = {
    "values": check_values,
    "chunks": check_chunks,
    "fixed shape": check_fixed_shape,
    "all kinds": check_all_kinds_share_a_workspace,
    "refusals": check_refusals,
    "versions": check_versions,
}


def main():
    """Make every check."""
    global FLASHINFER
    FLASHINFER = load()
    make_checks(CHECKS, (AssertionError, ValueError, UnsupportedError))


if __name__ == "__main__":
    sys.exit(main())
