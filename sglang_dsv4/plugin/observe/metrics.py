"""Metrics of the cache in SGLang's own Prometheus endpoint, with ``--enable-metrics``.

The scheduler process writes them where SGLang's own metrics go: files of prometheus-client's multiprocess mode, which the
HTTP process reads for ``/metrics``. Everything comes from lengths and counts that the host has; nothing waits for a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.plugin.observe.occupancy import pool_usage
from sglang_dsv4.plugin.observe.step_counts import RESTORED_BY, StepCounter, StepCounts


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name (str): as it is scraped; Prometheus wants counters, and only them, to end in ``_total``.
        help (str): its help text.
        labels (tuple[str, ...]): beside those that SGLang gives every metric of a scheduler.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``counter`` or ``gauge``."""
        return "counter" if self.name.endswith("_total") else "gauge"


PAGES = Metric(
    "sglang_dsv4_pages",
    "Pages by pool and by who holds them: nobody (free), the prefix cache alone (cached), it and running requests (shared), "
    "one running request (private).",
    ("pool", "state"),
)
REQUEST_SLOTS = Metric("sglang_dsv4_request_slots", "Places for the stream state of requests.", ("state",))
POOL_BYTES = Metric("sglang_dsv4_pool_bytes", "Bytes allocated for the cache, by pool.", ("pool",))
TAIL_TOKENS = Metric(
    "sglang_dsv4_tail_tokens",
    "Tokens of running requests in open blocks, which no entry holds yet, by compression ratio.",
    ("ratio",),
)
FLUSHES = Metric(
    "sglang_dsv4_flushes_total",
    "Times that a step of a request closed blocks and stored their entries, by compression ratio.",
    ("ratio",),
)
ENTRIES = Metric("sglang_dsv4_entries_written_total", "Entries stored, over all layers of a compression ratio.", ("ratio",))
PREFIX_TOKENS = Metric(
    "sglang_dsv4_prefix_tokens_total", "Tokens that admitted requests found in the prefix cache and did not compute."
)
RESTORED = Metric(
    "sglang_dsv4_boundary_states_restored_total",
    "Times that a request went on at a page boundary from the boundary state of the page before it, by cause: a prefix hit, "
    "the next chunk of a prompt, or decoding.",
    ("cause",),
)
CHECKS = Metric(
    "sglang_dsv4_integrity_checks_total", "Steps before which stored rows were compared with their checksums (--dsv4-check)."
)
FAILED_CHECKS = Metric(
    "sglang_dsv4_integrity_check_failures_total", "Integrity checks that found a wrong row; the first one stops the server."
)
INFO = Metric(
    "sglang_dsv4_info", "Always 1; the labels say what runs.", ("version", "row_format", "index_format", "kernels", "attention")
)
BY_RATIO = (TAIL_TOKENS, FLUSHES, ENTRIES)
METRICS = (PAGES, REQUEST_SLOTS, POOL_BYTES, *BY_RATIO, PREFIX_TOKENS, RESTORED, CHECKS, FAILED_CHECKS, INFO)


class CacheMetrics:
    """The metrics of one scheduler.

    Args:
        scheduler (Any): SGLang's Scheduler, ready to serve.
        registry (Any): where the metrics are registered; prometheus-client's default one by default.
    """

    def __init__(self, scheduler: Any, registry: Any = None) -> None:
        # Not before: prometheus-client decides at import whether it writes to files that other processes read.
        from prometheus_client import REGISTRY

        self._registry = REGISTRY if registry is None else registry
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self._scheduler = scheduler
        self._common = dict(scheduler.metrics_reporter.metrics_collector.labels)
        self._page_tokens = pool.cache.spec.page_tokens
        self._steps = StepCounter(pool.cache.spec)
        self._checks = scheduler.tp_worker.model_runner.attn_backend.checks
        self._gauges: dict[tuple[str, ...], int] = {}
        self._children: dict[tuple[str, ...], Any] = {}
        self._checks_counted = self._failures_counted = 0
        self._declare(pool.facts)

    def _declare(self, facts: dict[str, Any]) -> None:
        """Make every series that will ever be written, so that each is there from the start, counters at 0."""
        ratios = [(str(ratio),) for ratio in self._steps.ratios]
        report = facts["report"]
        runs = {**facts, **report}
        series: dict[Metric, list[tuple[str, ...]]] = {
            PAGES: [(pool, state) for pool in ("history", "window") for state in ("free", "cached", "shared", "private")],
            REQUEST_SLOTS: [("free",), ("used",)],
            POOL_BYTES: [(pool,) for pool in report["bytes_by_pool"]],
            **dict.fromkeys(BY_RATIO, ratios),
            RESTORED: [(cause,) for cause in RESTORED_BY],
            INFO: [tuple(str(runs[label]) for label in INFO.labels)],
        }
        for metric in METRICS:
            self._add(metric, series.get(metric, [()]))
        for pool, size in report["bytes_by_pool"].items():
            self._set(POOL_BYTES, (pool,), size)
        self._set(INFO, series[INFO][0], 1)
        self._take_tails(dict.fromkeys(self._steps.ratios, 0))
        self._take_pages()

    def _add(self, metric: Metric, series: list[tuple[str, ...]]) -> None:
        from prometheus_client import Counter, Gauge

        labels = (*self._common, *metric.labels)
        if metric.kind == "counter":
            made = Counter(metric.name, metric.help, labels, registry=self._registry)
        else:
            made = Gauge(metric.name, metric.help, labels, registry=self._registry, multiprocess_mode="mostrecent")
        for values in series:
            own = dict(zip(metric.labels, values, strict=True))
            self._children[(metric.name, *values)] = made.labels(**self._common, **own)

    def _set(self, metric: Metric, values: tuple[str, ...], value: int) -> None:
        key = (metric.name, *values)
        if self._gauges.get(key) != value:
            self._gauges[key] = value
            self._children[key].set(value)

    def _add_to(self, metric: Metric, values: tuple[str, ...], amount: int) -> None:
        if amount:
            self._children[(metric.name, *values)].inc(amount)

    def take_step(self, batch: Any) -> None:
        """Count a step that has run; an idle one is none."""
        if batch.forward_mode.is_decode() or batch.forward_mode.is_extend():
            counts: StepCounts = self._steps.count(batch, self._scheduler.running_batch)
            for ratio in self._steps.ratios:
                self._add_to(FLUSHES, (str(ratio),), counts.flushes[ratio])
                self._add_to(ENTRIES, (str(ratio),), counts.entries[ratio])
            for cause, number in counts.restored.items():
                self._add_to(RESTORED, (cause,), number)
            self._add_to(PREFIX_TOKENS, (), counts.prefix_tokens)
            self._take_tails(counts.tail_tokens)
            self._take_pages()

    def take_checks(self) -> None:
        """Count the integrity checks since the last call."""
        if self._checks is None:
            return
        self._add_to(CHECKS, (), self._checks.num_run - self._checks_counted)
        self._add_to(FAILED_CHECKS, (), self._checks.num_failed - self._failures_counted)
        self._checks_counted = self._checks.num_run
        self._failures_counted = self._checks.num_failed

    def take_idle(self) -> None:
        """Bring the gauges to what is there when nothing runs; called again and again while that lasts."""
        if self._scheduler.is_fully_idle():
            self._take_tails(dict.fromkeys(self._steps.ratios, 0))
        self._take_pages()

    def _take_tails(self, tail_tokens: dict[int, int]) -> None:
        for ratio, tokens in tail_tokens.items():
            self._set(TAIL_TOKENS, (str(ratio),), tokens)

    def _take_pages(self) -> None:
        tree = self._scheduler.tree_cache
        usage = pool_usage(self._scheduler, self._page_tokens)
        for pool, held in (("history", tree.full_protected_size()), ("window", tree.swa_protected_size())):
            pages, shared = usage[f"{pool}_pages"], held // self._page_tokens
            for state, number in (
                ("free", pages["free"]),
                ("cached", pages["cached"]),
                ("shared", shared),
                ("private", pages["used"] - shared),
            ):
                self._set(PAGES, (pool, state), number)
        for state in ("free", "used"):
            self._set(REQUEST_SLOTS, (state,), usage["request_slots"][state])


def begin(result: Any, scheduler: Any) -> Any:
    """Hook after ``Scheduler.get_init_info``: the cache is there, and no request yet."""
    if scheduler.metrics_reporter.current_scheduler_metrics_enabled:
        scheduler.sglang_dsv4_metrics = CacheMetrics(scheduler)
    return result


def around_step(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
    """Hook around ``Scheduler.run_batch``."""
    metrics = getattr(scheduler, "sglang_dsv4_metrics", None)
    if metrics is None:
        return original(scheduler, batch, *args, **kw)
    try:
        result = original(scheduler, batch, *args, **kw)
    finally:
        metrics.take_checks()
    metrics.take_step(batch)
    return result


def before_idle(scheduler: Any) -> None:
    """Hook before ``Scheduler.on_idle``."""
    metrics = getattr(scheduler, "sglang_dsv4_metrics", None)
    if metrics is not None:
        metrics.take_idle()
