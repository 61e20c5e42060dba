"""The step over decoded rows: which pages, by which numbers, and when; against the lists over the pool."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.page_decode import naive_page_decode
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.row_lists import naive_row_lists
from sglang_dsv4.attention import HostLengths
from sglang_dsv4.attention.decoded_prefill import choose_decoded, count_pages, decoded_step
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.check.attention_work import AttentionCase, AttentionWork, fill
from tests.attention.flashmla_checks import EXTENDS, STARTS, forget_unlisted
from tests.cache.driver import make_spec

CPU = torch.device("cpu")
KINDS = ("window", "csa", "hca")


def make_work(kind, starts=STARTS, extends=EXTENDS):
    work = AttentionWork(AttentionCase(kind, starts, extends, 1), 1, "fp8_584", CPU)
    forget_unlisted(work, 0)
    return work


def decode(pool, spec, ratio, step, decoded):
    """The decoded rows of a layer."""
    rows = torch.full((decoded.num_rows(ratio), 512), -7.0, dtype=torch.bfloat16)
    naive_page_decode(
        pool, spec.rows, decoded.window_pages, decoded.history_pages, step.page_tokens, ratio, step.num_window_rows, rows
    )
    return rows


def faults(work, decoded):
    """Queries whose listed rows are others than those over the pool, or in another order."""
    step, pool, spec = work.plan.step, work.cache.layers[0].pool, work.cache.spec
    rows = decode(pool, spec, work.kind.ratio, step, decoded)
    width = work.kind.width(work.case.longest)
    physical, numbered = torch.full((2, work.case.num_tokens, width), -9, dtype=torch.int32)
    naive_row_lists(step, work.kind, physical, work.selected[0], pad=True)
    chosen = work.selected_by(0, decoded.step)
    naive_row_lists(decoded.step, work.kind, numbered, chosen, pad=True)
    assert torch.equal(physical < 0, numbered < 0) and (numbered < len(rows)).all()
    found = []
    for token in range(work.case.num_tokens):
        used = physical[token] >= 0
        expected = naive_load_rows(pool, physical[token, used].long(), spec.rows)
        assert torch.isfinite(expected).all()
        if not torch.equal(rows[numbered[token, used].long()].float(), expected):
            found.append(token)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("starts", "extends"), [(STARTS, EXTENDS), ((0,), (600,)), ((127, 128, 900, 0), (3, 1, 0, 257)), ((5, 0), (0, 1))], ids=str
)
def test_lists_name_the_same_rows_in_the_same_order(kind, starts, extends):
    work = make_work(kind, starts, extends)
    counts = count_pages(work.lengths, 256, 128)
    assert faults(work, decoded_step(work.plan.step, counts, 128)) == []


@pytest.mark.parametrize("table", ["window_pages", "history_pages"])
def test_one_page_off_is_noticed(table):
    """The twin: one request's pages, or their places, one too far; the others' lists are right."""
    work = make_work("csa")
    decoded = decoded_step(work.plan.step, count_pages(work.lengths, 256, 128), 128)
    places = getattr(decoded.step, table).clone()
    places[3] += 1
    wrong = replace(decoded, step=replace(decoded.step, **{table: places}))
    assert faults(work, wrong) == [sum(EXTENDS[:3])]
    pages = getattr(decoded, table).roll(1)
    assert len(faults(work, replace(decoded, **{table: pages}))) > 200


def test_page_counts():
    lengths = HostLengths((1150, 109, 384, 384, 532), EXTENDS)
    counts = count_pages(lengths, 256, 128)
    assert (counts.num_window, counts.num_history) == (2 + 1 + 0 + 1 + 2, 5 + 1 + 0 + 2 + 3)


@pytest.mark.parametrize(
    ("ends", "extends", "decoded"),
    [
        ((1024,), (1024,), True),
        ((1023,), (1023,), False),
        ((512, 511), (512, 511), False),
        ((512, 512), (512, 512), True),
        # Many requests with a token each read a page of 256 rows and more for it.
        ((128,) * 1100, (1,) * 1100, False),
        # 65,536 rows for 1,024 tokens: five window pages, and 1,004 pages of 64 entries.
        ((1004 * 256,), (1024,), True),
        ((1004 * 256 + 1,), (1024,), False),
        # 262,144 rows in 256 MiB: 33 window pages, and 3,964 pages of entries.
        ((3964 * 256,), (8192,), True),
        ((3964 * 256 + 1,), (8192,), False),
    ],
)
def test_when_rows_are_decoded(ends, extends, decoded):
    """By the lengths alone; a request without new tokens changes nothing."""
    spec = make_spec(("fp8_584", "fp8"))
    for more in ((), (100_000,)):
        lengths = HostLengths((*more, *ends), (*(0 for _ in more), *extends))
        assert (choose_decoded(lengths, spec) is not None) == decoded


@pytest.mark.parametrize("extends", [(300, 40), (50, 10)], ids=["chosen", "all"])
def test_chosen_entries_are_numbered(extends):
    """`LayerCache.select` by another numbering: the same entries."""
    spec = make_spec(("fp8_584", "fp8"))
    cache = CompressedKVCache(spec, num_pages=8, max_requests=4)
    cache.plan([(cache.open(), 10)])
    plan = cache.plan([(cache.open(), count) for count in extends])
    plan.appended.add((1, Part.INDEX))  # the keys are drawn, not appended
    layer, generator = cache.layers[1], torch.Generator().manual_seed(1)
    fill(layer.pool, spec.rows, generator)
    fill(layer.memory.storage.tensor(Kind.INDEX_KEY, Part.INDEX), spec.index_keys, generator)
    lengths = HostLengths(extends, extends)
    decoded = decoded_step(plan.step, count_pages(lengths, spec.page_tokens, 128), 128)
    rows = decode(layer.pool, spec, 4, plan.step, decoded)
    arguments = (plan, torch.randn(sum(extends), 4, 128), torch.rand(sum(extends), 4))
    physical = layer.select(*arguments)
    numbered = layer.select(*arguments, numbering=decoded.step)
    used = physical >= 0
    assert torch.equal(numbered >= 0, used) and used.any()
    expected = naive_load_rows(layer.pool, physical[used], spec.rows)
    assert torch.equal(rows[numbered[used]].float(), expected)
    assert not torch.equal(rows[numbered[used].roll(1)].float(), expected)
    place = torch.full((sum(extends), 16), -5, dtype=torch.int32)
    layer.select(*arguments, place, decoded.step)
    width = used.shape[1]
    assert torch.equal(place[:, :width][used], numbered[used].int())
    assert (place[:, :width][~used] == -5).all()
