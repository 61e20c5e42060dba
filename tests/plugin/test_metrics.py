"""Metrics: the numbers of a schedule against one that is walked token by token, and what Prometheus is told."""

import random
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_dsv4.plugin.observe.metrics import METRICS, CacheMetrics, around_step, before_idle
from sglang_dsv4.plugin.observe.proof import describe
from sglang_dsv4.plugin.observe.step_counts import StepCounter
from tests.cache.driver import make_spec
from tests.plugin.small_server import make_pool

pytestmark = pytest.mark.sglang

PAGE_TOKENS = 256
LAYERS = {4: 3, 128: 2}


def spec_of(layers=LAYERS):
    """Two window-only layers, three of CSA, two of HCA."""
    one = {layer.ratio: layer for layer in make_spec().layers}
    chosen = [one[0], one[0], *(one[ratio] for ratio, number in layers.items() for _ in range(number))]
    return SimpleNamespace(layers=tuple(chosen), page_tokens=PAGE_TOKENS)


class Walk:
    """A schedule, and what it does when every token is taken by itself."""

    def __init__(self):
        self.lengths = {}
        self.seen = {"flushes": dict.fromkeys(LAYERS, 0), "entries": dict.fromkeys(LAYERS, 0)}
        self.restored = dict.fromkeys(("prefix_hit", "chunk", "decode"), 0)
        self.prefix_tokens = 0

    def take(self, request, begin, end, cause):
        if begin and begin % PAGE_TOKENS == 0:
            self.restored[cause] += 1
        closed = set()
        for position in range(begin, end):
            for ratio, layers in LAYERS.items():
                if position % ratio == ratio - 1:
                    closed.add(ratio)
                    self.seen["entries"][ratio] += layers
        for ratio in closed:
            self.seen["flushes"][ratio] += 1
        self.lengths[request] = end

    def tails(self):
        return {ratio: sum(end % ratio for end in self.lengths.values()) for ratio in LAYERS}


def mode(name):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return ForwardMode[name]


def batch_of(lengths):
    """A batch that decodes; as SGLang keeps them, lengths with the step's token."""
    return SimpleNamespace(
        forward_mode=mode("DECODE"), reqs=list(lengths), seq_lens_cpu=torch.tensor(list(lengths.values()), dtype=torch.int64)
    )


def extend(items, chunked, decoding=()):
    """``items``: (request, begin, end)."""
    return SimpleNamespace(
        forward_mode=mode("MIXED" if decoding else "EXTEND"),
        reqs=[request for request, *_ in items],
        prefix_lens=[begin for _, begin, _ in items],
        extend_lens=[end - begin for _, begin, end in items],
        decoding_reqs=list(decoding) or None,
        chunked_req=chunked,
    )


def random_steps(seed, num_steps=300):
    """(batch, running, walk) after each step of a schedule: chunks, hits, decoding beside and within prefills."""
    rng, walk, running, chunked = random.Random(seed), Walk(), {}, None
    for number in range(num_steps):
        for request in [name for name in running if rng.random() < 0.02]:
            del running[request], walk.lengths[request]
        if chunked is None and running and rng.random() < 0.8:
            running = {name: end + 1 for name, end in running.items()}
            for name, end in running.items():
                walk.take(name, end - 1, end, "decode")
            batch = batch_of(running)
            yield batch, batch, walk
            continue
        name, begin, cause = (
            (f"r{number}", PAGE_TOKENS * rng.choice([0, 0, 1, 2, 3]), "prefix_hit")
            if chunked is None
            else (chunked, walk.lengths[chunked], "chunk")
        )
        walk.prefix_tokens += begin if cause == "prefix_hit" else 0
        is_last = rng.random() < 0.6
        end = begin + (rng.randint(1, 700) if is_last else PAGE_TOKENS * rng.randint(1, 3))
        walk.take(name, begin, end, cause)
        chunked = None if is_last else name
        mixed = running if rng.random() < 0.4 else {}
        for other in mixed:
            running[other] += 1
            walk.take(other, running[other] - 1, running[other], "decode")
        items = [(name, begin, end), *((other, at - 1, at) for other, at in mixed.items())]
        beside = {} if mixed else dict(running)
        yield extend(items, chunked, mixed), batch_of(beside), walk
        if is_last:
            running[name] = end


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_walk_token_by_token(seed):
    counter = StepCounter(spec_of())
    flushes, entries = dict.fromkeys(LAYERS, 0), dict.fromkeys(LAYERS, 0)
    restored, prefix_tokens, modes = dict.fromkeys(("prefix_hit", "chunk", "decode"), 0), 0, set()
    for batch, running, walk in random_steps(seed):
        counts = counter.count(batch, running)
        modes.add(batch.forward_mode.name)
        for ratio in LAYERS:
            flushes[ratio] += counts.flushes[ratio]
            entries[ratio] += counts.entries[ratio]
        for cause, number in counts.restored.items():
            restored[cause] += number
        prefix_tokens += counts.prefix_tokens
        assert counts.tail_tokens == walk.tails()
        assert {"flushes": flushes, "entries": entries} == walk.seen
        assert (restored, prefix_tokens) == (walk.restored, walk.prefix_tokens)
    assert modes == {"DECODE", "EXTEND", "MIXED"}
    assert all(restored.values()) and all(flushes.values()) and prefix_tokens


class Stats:
    """SGLang's pool statistics, in tokens."""

    full_available_size, full_evictable_size, full_num_used = 8 * 256, 3 * 256, 4 * 256
    swa_available_size, swa_evictable_size, swa_num_used = 9 * 256, 1 * 256, 2 * 256


def scheduler_of(checks=None):
    """As much of SGLang's Scheduler as the metrics look at, with a real pool."""
    pool = make_pool(make_spec())
    pool.facts = describe(pool.cache, "eager", "for a test", [])
    stats = Stats()
    return SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        metrics_reporter=SimpleNamespace(metrics_collector=SimpleNamespace(labels={"model_name": "tiny", "tp_rank": 0})),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(attn_backend=SimpleNamespace(checks=checks))),
        pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: stats),
        stats=stats,
        req_to_token_pool=SimpleNamespace(size=5, available_size=lambda: 3),
        tree_cache=SimpleNamespace(full_protected_size=lambda: 512, swa_protected_size=lambda: 256),
        running_batch=batch_of({}),
        is_fully_idle=lambda: True,
        pool=pool,
    )


def scraped(registry):
    """Every sample, by name and labels other than SGLang's."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny" and sample.labels.pop("tp_rank") == "0"
            samples[(sample.name, *sample.labels.values())] = sample.value
    return {key: value for key, value in samples.items() if not key[0].endswith("_created")}


def test_every_series_is_there_before_the_first_step():
    registry = CollectorRegistry()
    scheduler = scheduler_of()
    CacheMetrics(scheduler, registry)
    samples = scraped(registry)
    assert {name for name, *_ in samples} == {metric.name for metric in METRICS}
    pages = {key[1:]: value for key, value in samples.items() if key[0] == "sglang_dsv4_pages"}
    assert pages == {
        ("history", "free"): 8,
        ("history", "cached"): 3,
        ("history", "shared"): 2,
        ("history", "private"): 2,
        ("window", "free"): 9,
        ("window", "cached"): 1,
        ("window", "shared"): 1,
        ("window", "private"): 1,
    }
    sizes = {key[1]: value for key, value in samples.items() if key[0] == "sglang_dsv4_pool_bytes"}
    assert sum(sizes.values()) == scheduler.pool.get_kv_size_bytes()
    counters = [metric.name for metric in METRICS if metric.kind == "counter"]
    assert all(value == 0 for (name, *_), value in samples.items() if name in counters)
    assert samples["sglang_dsv4_request_slots", "used"] == 2


def test_what_a_step_and_an_idle_moment_change():
    registry, checks = CollectorRegistry(), SimpleNamespace(num_run=4, num_failed=0)
    scheduler = scheduler_of(checks)
    scheduler.sglang_dsv4_metrics = CacheMetrics(scheduler, registry)
    batch = extend([("a", 256, 515)], None)

    def run(_, batch):
        checks.num_run += 1
        scheduler.stats.full_available_size -= 512
        scheduler.stats.full_num_used += 512
        return batch

    before = scraped(registry)
    assert around_step(run, scheduler, batch) is batch
    after = scraped(registry)
    # 64 to 128 CSA entries and 2 to 4 HCA entries, in one layer each; three tokens are left over.
    assert {key: after[key] - before[key] for key in after if after[key] != before[key]} == {
        ("sglang_dsv4_flushes_total", "4"): 1,
        ("sglang_dsv4_flushes_total", "128"): 1,
        ("sglang_dsv4_entries_written_total", "4"): 64,
        ("sglang_dsv4_entries_written_total", "128"): 2,
        ("sglang_dsv4_tail_tokens", "4"): 3,
        ("sglang_dsv4_tail_tokens", "128"): 3,
        ("sglang_dsv4_prefix_tokens_total",): 256,
        ("sglang_dsv4_boundary_states_restored_total", "prefix_hit"): 1,
        ("sglang_dsv4_integrity_checks_total",): 5,
        ("sglang_dsv4_pages", "history", "free"): -2,
        ("sglang_dsv4_pages", "history", "private"): 2,
    }
    scheduler.stats.full_available_size += 512
    scheduler.stats.full_num_used -= 512
    scheduler.is_fully_idle = lambda: False  # a prompt waits for its next chunk
    before_idle(scheduler)
    assert {key[0] for key, value in scraped(registry).items() if value != after[key]} == {"sglang_dsv4_pages"}
    scheduler.is_fully_idle = lambda: True
    before_idle(scheduler)
    idle = scraped(registry)
    assert {key for key in idle if idle[key] != after[key]} == {
        ("sglang_dsv4_tail_tokens", "4"),
        ("sglang_dsv4_tail_tokens", "128"),
        ("sglang_dsv4_pages", "history", "free"),
        ("sglang_dsv4_pages", "history", "private"),
    }
    assert all(idle[key] == before[key] for key in idle if key[0] == "sglang_dsv4_pages")


def test_a_check_that_fails_is_counted_and_the_error_goes_on():
    registry, checks = CollectorRegistry(), SimpleNamespace(num_run=0, num_failed=0)
    scheduler = scheduler_of(checks)
    scheduler.sglang_dsv4_metrics = CacheMetrics(scheduler, registry)

    def run(*_):
        checks.num_run += 1
        checks.num_failed += 1
        raise RuntimeError("I8")

    with pytest.raises(RuntimeError, match="I8"):
        around_step(run, scheduler, extend([("a", 0, 515)], None))
    after = scraped(registry)
    assert after["sglang_dsv4_integrity_check_failures_total",] == 1
    assert after["sglang_dsv4_entries_written_total", "4"] == 0


def test_without_metrics_nothing_is_looked_at():
    nothing = object()  # reading any attribute of it would fail
    scheduler = SimpleNamespace()
    assert around_step(lambda *given: given, scheduler, nothing) == (scheduler, nothing)
    before_idle(scheduler)


def test_names_and_help_follow_the_conventions_of_prometheus():
    for metric in METRICS:
        assert metric.name.startswith("sglang_dsv4_")
        assert metric.help.endswith(".") and metric.help[0].isupper()
    assert len({metric.name for metric in METRICS}) == len(METRICS)
