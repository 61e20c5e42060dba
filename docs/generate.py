"""Writes the parts of the documentation that come from the code: tables between markers, and the picture.

``python docs/generate.py`` rewrites them; `tests/project/test_docs.py` fails where one is out of date.
"""

import argparse
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sglang_dsv4.cache.regions import Owner, RegionTable, history_bytes_per_token
from sglang_dsv4.cache.sizing import GIB, most_tokens, released_spec
from sglang_dsv4.plugin.install import options, refusals
from sglang_dsv4.plugin.install.versions import SERVED
from sglang_dsv4.plugin.observe import metrics

DOCS = Path(__file__).parent
PAGES = ("serving.md",)
PICTURE = DOCS / "sequence.svg"
PICTURE_TOKENS = 451
MODELS = ("flash", "pro")
FORMATS = (("bf16", "bf16"), ("fp8_584", "fp8"))
MEMORIES_GIB = (4, 8, 16, 24, 32, 48, 64, 80, 120, 160)
REQUESTS, WINDOW_SHARE = 64, 0.1


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a column of numbers is aligned to the right."""
    head, rows = list(head), [list(row) for row in rows]
    right = [all(re.fullmatch(r"[\d,.]+|–", row[column]) for row in rows) for column in range(len(head))]
    rule = ["--:" if numbers else "---" for numbers in right]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def flags() -> str:
    """The plug-in's own flags."""
    parser = argparse.ArgumentParser(add_help=False)
    options.add_arguments(parser)
    return table(
        ("flag", "meaning"),
        (
            (f"`{' '.join(filter(None, (action.option_strings[0], action.metavar)))}`", action.help or "")
            for action in parser._actions
        ),
    )


def refused() -> str:
    """What the plug-in does not serve: in all versions of SGLang, and in one alone."""
    rows = [(f"`{refusal.option}`", refusal.reason) for refusal in refusals.REFUSALS]
    rows += [(f"`{refusal.option}` ({version.number})", refusal.reason) for version in SERVED for refusal in version.refusals]
    rows += [(f"`{variable.name}`", variable.reason) for variable in refusals.REFUSED_VARIABLES]
    return table(("option or variable", "reason"), rows)


def _specs():
    for model in MODELS:
        for rows, keys in FORMATS:
            yield (f"{model.title()}, `{rows}`", released_spec(model, row_format=rows, index_format=keys))


def sizes() -> str:
    """The most tokens by memory."""
    specs = list(_specs())
    rows = [
        (f"{memory}", *(f"{most_tokens(spec, memory * GIB, REQUESTS, WINDOW_SHARE):,}" for _, spec in specs))
        for memory in MEMORIES_GIB
    ]
    return table(("GiB for the cache", *(name for name, _ in specs)), rows)


def parts() -> str:
    """Bytes of each part."""
    rows = [
        (
            name,
            f"{history_bytes_per_token(spec):,.2f}",
            f"{RegionTable(spec).bytes_of(Owner.HISTORY_PAGE):,}",
            f"{RegionTable(spec).bytes_of(Owner.WINDOW_PAGE):,}",
            f"{RegionTable(spec).bytes_of(Owner.STATE_SLOT):,}",
        )
        for name, spec in _specs()
    ]
    head = ("bytes", "entries and index keys of a token", "history page", "window page", "stream state of a request")
    return table(head, rows)


def metric_table() -> str:
    """The plug-in's metrics."""
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels) or "–", metric.help)
        for metric in metrics.METRICS
    ]
    return table(("metric", "kind", "labels", "meaning"), rows)


TABLES = {"flags": flags, "refusals": refused, "sizes": sizes, "parts": parts, "metrics": metric_table}


def filled(page: str) -> str:
    """A page with its tables as the code has them now."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f"{begin}\n{TABLES[name]()}\n{end}"

    return re.sub(r"(<!-- begin (\w+):[^\n]*-->)\n.*?(<!-- end \2 -->)", fill, page, flags=re.DOTALL)


def picture() -> str:
    """A sequence in the cache, as SVG with its text as text."""
    import matplotlib

    from sglang_dsv4 import Runtime
    from sglang_dsv4.tiny import TinySpec, write_tiny_checkpoint

    matplotlib.rcParams.update({"svg.hashsalt": "sglang-dsv4", "svg.fonttype": "none"})
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_checkpoint(Path(folder), TinySpec())
        runtime = Runtime(folder, num_pages=8, max_ends=0, page_tokens=256, max_draft_tokens=0)
        text = "The history of tea begins with a leaf that fell into a pot. " * 8
        drawn = runtime.open(text[:PICTURE_TOKENS]).show()
        assert drawn.seq_len == PICTURE_TOKENS, drawn.seq_len
        figure = drawn.figure()
        with tempfile.NamedTemporaryFile(suffix=".svg") as file:
            figure.savefig(file.name, bbox_inches="tight", metadata={"Date": None})
            return Path(file.name).read_text(encoding="utf-8")


def main() -> None:
    """Rewrite what is generated."""
    for name in PAGES:
        path = DOCS / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
