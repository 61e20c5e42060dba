"""Checks of `FlashMLAAttention`'s long and short steps against fp64, on an SM90 and, with FlashMLA's kernels replaced by
`flashmla_model` and ours interpreted, on a CPU.

Run as a program it makes every check on the CPU and prints ``{check: "" or its fault}``: the replacement must be in place
before the module is imported.
"""

import importlib
import sys
from dataclasses import replace
from unittest import mock

import torch

from dsv4_kernels.row_codec import naive_put_row_bytes
from dsv4_kernels.row_lists import naive_row_lists
from dsv4_kernels.sparse_attention.bound import exact, worst
from sglang_dsv4.attention import FixedShape, HostLengths, decoded_prefill, device
from sglang_dsv4.check.attention_work import AttentionCase, AttentionWork
from tests.attention import flashmla_model
from tests.kernels.interpreting import make_checks

# Starts on, before and off page boundaries, windows that reach one page back, a request without new tokens, one with one.
STARTS, EXTENDS = (1000, 0, 384, 383, 512), (150, 109, 0, 1, 20)
QUERIES = (0, 23, 24, 149, 150, 258, 259, 260, 279)
KINDS = ("window", "csa", "hca")
# Tokens from which on rows are decoded here: the interpreter has no time for more.
FEWEST = 256
small = mock.patch.object(decoded_prefill, "FEWEST_TOKENS", FEWEST)


def make_work(kind, place, starts=STARTS, extends=EXTENDS, heads=64):
    case = AttentionCase(kind, starts, extends, heads)
    return AttentionWork(case, 2, "fp8_584", torch.device(place))


def forget_unlisted(work, layer_id):
    """NaN in every row that no query lists."""
    pool, fmt = work.cache.layers[layer_id].pool, work.cache.spec.rows
    listed = work.indices(layer_id)
    unlisted = torch.ones(len(pool) * fmt.group_rows, dtype=torch.bool, device=pool.device)
    unlisted[listed[listed >= 0]] = False
    slots = torch.nonzero(unlisted).flatten()
    nan = torch.full((len(slots), fmt.row_bytes), 0xFF, dtype=torch.uint8, device=pool.device)
    naive_put_row_bytes(pool, slots, nan, fmt)


def make(work, fixed=None):
    module = importlib.import_module("sglang_dsv4.attention.flashmla")
    return module.FlashMLAAttention(work.cache, work.case.heads, fixed=fixed)


def errors(attention, work, layer_id, queries):
    """Attend, and by how much of what is allowed the results of some queries are off; layer 1 without the rotation."""
    chosen, undo_rope = work.selected_by(layer_id, attention.numbering), layer_id == 1
    out = attention.run(work.cache.layers[layer_id], work.q[layer_id], work.sink, chosen, undo_rope=undo_rope)
    table = work.cache.layers[layer_id].rope_table
    found = []
    for query in queries:
        angles = table[work.plan.step.positions[query]] if undo_rope else None
        rows = work.rows(layer_id, query)
        expected = exact(work.q[layer_id][query], rows, work.sink, 512**-0.5, angles)
        found.append(worst(out[query], expected))
    return found


def shifted(module, request):
    """`decoded_step` with one request's window pages one place too far."""
    make_step = module.decoded_step

    def wrong(*args):
        made = make_step(*args)
        pages = made.step.window_pages.clone()
        pages[request] += 1
        return replace(made, step=replace(made.step, window_pages=pages))

    return mock.patch.object(module, "decoded_step", wrong)


@small
def check_long_steps(device="cpu", heads=64):
    """Rows decoded once, in every kind of layer; a window one page off is noticed, and entries numbered by the pool are."""
    module = importlib.import_module("sglang_dsv4.attention.flashmla")
    for kind in KINDS:
        work = make_work(kind, device, heads=heads)
        for layer_id in range(2):
            forget_unlisted(work, layer_id)
        attention = make(work)
        attention.begin(work.plan, work.lengths)
        assert attention.needs_host_lengths and attention.numbering is not None
        # The rotation, which layer 1 has undone, takes the interpreter longest; it is the same in every kind.
        for layer_id in (1, 0) if kind == "window" or device != "cpu" else (0,):
            found = errors(attention, work, layer_id, QUERIES)
            assert max(found) <= 1, (kind, layer_id, found)
        with shifted(module, 3):
            attention.begin(work.plan, work.lengths)
        found = errors(attention, work, 0, QUERIES)
        assert found[QUERIES.index(259)] > 1, f"{kind}: a window one page off went unnoticed"
        assert max(found[:5]) <= 1, (kind, found)
        if kind == "csa":
            attention.begin(work.plan, work.lengths)
            numbering = attention.numbering
            entries = numbering.num_window_rows + 64  # a page on
            moved = replace(numbering, num_window_rows=entries)
            chosen = work.selected_by(0, moved)[: QUERIES[1]]
            chosen = torch.cat([chosen, work.selected_by(0, numbering)[QUERIES[1] :]])
            with mock.patch.object(work, "selected_by", lambda *_, rows=chosen: rows):
                found = errors(attention, work, 0, QUERIES[:3])
            assert found[0] > 1 and max(found[1:]) <= 1, found


@small
def check_short_steps(device="cpu"):
    """A step of fewer tokens, before and after a long one, reads packed rows; the buffer of decoded rows stays."""
    for kind in KINDS:
        work = make_work(kind, device)
        attention = make(work)
        few = make_work(kind, device, (1000, 383), (FEWEST - 1 - 60, 60))
        short = make(few)
        short.begin(few.plan, few.lengths)
        queries = (0, 100, 194, 195, 254)
        assert short.numbering is None and max(errors(short, few, 0, queries)) <= 1
        kept = []
        for _ in range(2):
            attention.begin(work.plan, work.lengths)
            assert attention.numbering is not None and max(errors(attention, work, 0, (0, 279))) <= 1
            kept.append(dict(attention.buffers()))
            one = slice(0, 3)
            step = work.plan.step
            step = replace(step, positions=step.positions[one], token_rows=step.token_rows[one])
            attention.begin(replace(work.plan, step=step), HostLengths((1003,), (3,)))
            assert attention.numbering is None
            chosen = work.selected[0] if work.selected[0] is None else work.selected[0][one]
            out = attention.run(work.cache.layers[0], work.q[0][one], work.sink, chosen)
            assert torch.isfinite(out).all()
        # Of 2,240 rows at most; room is made for 16,384 at a time.
        assert 16384 * 1024 in kept[0].values() and kept[0] == kept[1], (kind, kept)


def check_fixed_shape(device="cpu"):
    """A graph's buffers, lengths included, stay where they are; its plan needs nothing of the host."""
    work = make_work("csa", device, (1000, 300, 5), (1, 1, 1))
    attention = make(work, FixedShape(5, 1280))
    assert not attention.needs_host_lengths and attention.numbering is None
    step, kept = work.plan.step, []
    for pad in (-1, -1):
        padded = torch.cat([step.positions, step.positions.new_full((2,), pad)])
        rows = torch.cat([step.token_rows, step.token_rows.new_zeros(2)])
        attention.begin(replace(work.plan, step=replace(step, positions=padded, token_rows=rows)))
        kept.append(dict(attention.buffers()))
        lengths = attention._lengths["csa"]
        expected, lists = lengths.new_zeros(5), lengths.new_zeros(5, 448)  # 128 and 1280 / 4
        naive_row_lists(attention._plan.step, work.kind, lists, pad=True, lengths=expected)
        assert torch.equal(lengths, expected) and lengths.tolist()[3:] == [1, 1]
    assert kept[0] == kept[1] and {5 * 4, 5 * 448 * 4} == set(kept[0].values()), kept


CHECKS = {"long steps": check_long_steps, "short steps": check_short_steps, "fixed shape": check_fixed_shape}


def main():
    """Make every check as if on an SM90."""
    flashmla_model.install()
    device.device_of = lambda place: device.Device(place, (9, 0), 132)
    make_checks(CHECKS, (AssertionError, ValueError))


if __name__ == "__main__":
    sys.exit(main())
