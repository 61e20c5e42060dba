"""The house rules that can be read off the source: import direction, environment, broad excepts, raw allocations.

check, bench -> plugin, runtime -> attention -> cache -> dsv4_kernels -> torch, triton
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "kernels" / "dsv4_kernels", ROOT / "sglang_dsv4")

# What each package may import of ours beside itself. A package that is not listed (command line, demo) is on top and may
# import all of ours.
BELOW_CACHE = ("dsv4_kernels", "sglang_dsv4.errors", "sglang_dsv4.spec")
BELOW_TOP = (*BELOW_CACHE, "sglang_dsv4.cache", "sglang_dsv4.attention")
OURS = {
    "dsv4_kernels": (),
    "sglang_dsv4.errors": (),
    "sglang_dsv4.env": (),
    "sglang_dsv4.spec": ("dsv4_kernels", "sglang_dsv4.errors"),
    "sglang_dsv4.cache": BELOW_CACHE,
    "sglang_dsv4.attention": (*BELOW_CACHE, "sglang_dsv4.cache"),
    "sglang_dsv4.plugin": (*BELOW_TOP, "sglang_dsv4.env", "sglang_dsv4.__version__"),
    "sglang_dsv4.runtime": (*BELOW_TOP, "sglang_dsv4.env", "sglang_dsv4.__version__"),
    # Of the packages on top: `bench` checks before it times, so `check` knows nothing of it.
    "sglang_dsv4.check": (
        *BELOW_TOP,
        "sglang_dsv4.runtime",
        "sglang_dsv4.plugin",
        "sglang_dsv4.tiny",
        "sglang_dsv4.env",
        "sglang_dsv4.__version__",
    ),
}
# What the lower packages may import of others beside the standard library.
OTHERS = {
    "dsv4_kernels": {"torch", "triton"},
    "sglang_dsv4.errors": set(),
    "sglang_dsv4.env": set(),
    "sglang_dsv4.spec": {"torch"},
    "sglang_dsv4.cache": {"torch", "safetensors", "deep_gemm"},
    "sglang_dsv4.attention": {"torch", "packaging", "flashinfer", "flash_mla"},
}
# Packages that are at home in one place only.
HOMES = {
    "sglang": ("sglang_dsv4.plugin",),
    "sgl_kernel": ("sglang_dsv4.plugin",),
    "transformers": ("sglang_dsv4.runtime", "sglang_dsv4.check"),
    "flashinfer": ("sglang_dsv4.attention.flashinfer",),
    "flash_mla": ("sglang_dsv4.attention.flashmla", "sglang_dsv4.attention.sparse_prefill"),
    "deep_gemm": ("sglang_dsv4.cache.long_scores",),
}
# The commands of a lower package print tables; nothing else there does.
OTHERS_OF_COMMANDS = {"rich"}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}
ENVIRONMENT_FAULT = "touches the environment; only sglang_dsv4/env.py may"
# The functions that import a module by a name given as text.
BY_NAME = ("import_module", "__import__")
# Packages whose uninitialised memory the tests poison, and the calls that would get some behind their back.
POISONED = ("dsv4_kernels", "sglang_dsv4.cache", "sglang_dsv4.attention")
RAW_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """The line and name (``module`` or ``module.attribute``) of every import, at any depth, `import_module` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestors = module.split(".")[: None if is_package else -1]
            base = ancestors[: len(ancestors) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_NAME):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def imports_of_files(root: Path) -> dict[str, set[str]]:
    """By module, those of our files that it imports, at any depth; what only types need is no import when it runs."""
    files = {}
    for source in SOURCES:
        for path in sorted((root / source.relative_to(ROOT)).rglob("*.py")):
            place = path.relative_to(root / source.parent.relative_to(ROOT)).with_suffix("")
            files[".".join(place.parts).removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        tree = WithoutTypes().visit(ast.parse(path.read_text(encoding="utf-8")))
        names = {name for _, name in imports(tree, module, path.name == "__init__.py")}
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys() - {module}
    return graph


class WithoutTypes(ast.NodeTransformer):
    """Takes out ``if TYPE_CHECKING``."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files each of which imports the next, the last one being the first; empty where there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def import_faults(module: str, name: str) -> Iterator[str]:
    """What is wrong with ``module`` importing ``name``."""
    top = name.partition(".")[0]
    layer = next((package for package in OURS if inside(module, package)), None)
    if top in ("dsv4_kernels", "sglang_dsv4"):
        if layer and not any(inside(name, package) for package in (layer, *OURS[layer])):
            yield f"{layer} may not import {name}"
    elif top == "kernels":
        yield "`kernels` is another project's package; ours is dsv4_kernels"
    elif top in HOMES and not any(inside(module, home) for home in HOMES[top]):
        yield f"{top} may be imported in {' and '.join(HOMES[top])} only"
    elif top in OTHERS_OF_COMMANDS and module.endswith("command"):
        return
    elif layer in OTHERS and top not in sys.stdlib_module_names and top not in OTHERS[layer]:
        yield f"{layer} may not import {top}"
    elif top == "os" and name[3:] in ENVIRONMENT and module != "sglang_dsv4.env":
        yield ENVIRONMENT_FAULT


def node_faults(module: str, node: ast.AST) -> Iterator[str]:
    """What is wrong with one node, imports aside."""
    if isinstance(node, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
            yield "catches everything; name the errors that are meant"
    if not isinstance(node, ast.Attribute):
        return
    of_os = ast.unparse(node.value) == "os" and node.attr in ENVIRONMENT
    if of_os and module != "sglang_dsv4.env":
        yield ENVIRONMENT_FAULT
    poisoned = any(inside(module, package) for package in POISONED)
    if node.attr in RAW_ALLOCATIONS and poisoned and module != "dsv4_kernels.memory":
        yield f"{node.attr}: allocate with dsv4_kernels.memory.empty, which the tests poison"


def faults(package: Path) -> list[str]:
    """Every broken rule in a package, as ``file:line: what``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package.parent)
        is_package = path.name == "__init__.py"
        module = ".".join(place.parent.parts if is_package else place.with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, name in imports(tree, module, is_package):
            found += [f"{place}:{line}: {fault}" for fault in import_faults(module, name)]
        for node in ast.walk(tree):
            found += [f"{place}:{node.lineno}: {fault}" for fault in node_faults(module, node)]
    return found


@pytest.mark.parametrize("package", SOURCES, ids=lambda path: path.name)
def test_no_rule_is_broken(package):
    assert list(package.rglob("*.py")), f"{package}: no sources found"
    assert faults(package) == []


def test_no_files_import_each_other_in_a_circle():
    graph = imports_of_files(ROOT)
    assert len(graph) > 150 and graph["sglang_dsv4.attention.choose"] > {"sglang_dsv4.attention.flashmla"}
    assert circle(graph) == []


def test_a_circle_is_found(tmp_path):
    """Of three files, one import in a function and one of a package; a fourth is only read by the type checker."""
    sources = {
        "one.py": "from sglang_dsv4.two import thing",
        "two.py": "def f():\n    import sglang_dsv4.three",
        "three/__init__.py": "from sglang_dsv4 import one",
        "four.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sglang_dsv4.five",
        "five.py": "import sglang_dsv4.four",
    }
    for name, source in sources.items():
        path = tmp_path / "sglang_dsv4" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    found = circle(imports_of_files(tmp_path))
    assert {name.rpartition(".")[2] for name in found} == {"one", "two", "three"} and len(found) == 4
    (tmp_path / "sglang_dsv4" / "two.py").write_text("", encoding="utf-8")
    assert circle(imports_of_files(tmp_path)) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("dsv4_kernels/flush_csa/naive.py", "import sglang_dsv4.errors", "may not import sglang_dsv4.errors"),
        ("dsv4_kernels/flush_csa/naive.py", "import numpy", "may not import numpy"),
        ("dsv4_kernels/flush_csa/naive.py", "from kernels import get_kernel", "another project's package"),
        ("sglang_dsv4/cache/plan.py", "from sglang_dsv4 import attention", "may not import sglang_dsv4.attention"),
        ("sglang_dsv4/cache/plan.py", "from ..attention import base", "may not import sglang_dsv4.attention.base"),
        ("sglang_dsv4/cache/__init__.py", "from ..plugin.serve import pool", "may not import sglang_dsv4.plugin.serve"),
        ("sglang_dsv4/cache/plan.py", "from sglang_dsv4 import env", "may not import sglang_dsv4.env"),
        ("sglang_dsv4/cache/plan.py", "def f():\n    import triton", "may not import triton"),
        ("sglang_dsv4/cache/plan.py", "import rich", "may not import rich"),
        ("sglang_dsv4/spec.py", "from sglang_dsv4.cache import plan", "may not import sglang_dsv4.cache.plan"),
        ("sglang_dsv4/attention/eager.py", "import flashinfer.mla", "in sglang_dsv4.attention.flashinfer only"),
        ("sglang_dsv4/attention/base.py", "from sglang_dsv4.check import oracle", "may not import"),
        ("sglang_dsv4/plugin/serve/pool.py", "import sglang_dsv4.check.oracle", "may not import"),
        (
            "sglang_dsv4/plugin/serve/pool.py",
            "from transformers import AutoConfig",
            "in sglang_dsv4.runtime and sglang_dsv4.check only",
        ),
        ("sglang_dsv4/check/demo/run.py", "import sglang", "in sglang_dsv4.plugin only"),
        ("sglang_dsv4/cli.py", "m = importlib.import_module('sglang.srt')", "in sglang_dsv4.plugin only"),
        ("sglang_dsv4/cli.py", "import os\nos.environ['A'] = 'b'", "touches the environment"),
        ("sglang_dsv4/cli.py", "from os import getenv", "touches the environment"),
        ("sglang_dsv4/cli.py", "try:\n    pass\nexcept Exception:\n    raise", "catches everything"),
        ("sglang_dsv4/cli.py", "try:\n    pass\nexcept (OSError, BaseException):\n    pass", "catches everything"),
        ("sglang_dsv4/cli.py", "try:\n    pass\nexcept:\n    pass", "catches everything"),
        ("sglang_dsv4/attention/eager.py", "out = torch.empty_like(q)", "which the tests poison"),
        ("dsv4_kernels/flush_csa/fused.py", "out = kv.new_empty(3)", "which the tests poison"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, source, fault):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    found = faults(tmp_path / Path(path).parts[0])
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dsv4_kernels/flush_csa/fused.py", "import math\nimport torch\nimport triton.language as tl"),
        ("dsv4_kernels/flush_csa/__init__.py", "from .naive import naive_flush"),
        ("dsv4_kernels/memory.py", "tensor = torch.empty(3)"),
        ("sglang_dsv4/env.py", "import os\nos.environ['A'] = 'b'"),
        ("sglang_dsv4/attention/flashinfer.py", "import flashinfer\nfrom sglang_dsv4.cache import view"),
        ("sglang_dsv4/cache/inspect/command.py", "from rich.table import Table"),
        ("sglang_dsv4/plugin/portable/ops.py", "import sglang.srt\nfrom sglang_dsv4 import __version__, env"),
        ("sglang_dsv4/check/oracle.py", "import transformers"),
        ("sglang_dsv4/check/demo/run.py", "import httpx\nfrom sglang_dsv4.check import oracle"),
        ("sglang_dsv4/cli.py", "try:\n    pass\nexcept OSError:\n    raise"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert faults(tmp_path / Path(path).parts[0]) == []


def bench_imports(folder: Path) -> list[str]:
    """Imports of the benchmark in tests of anything else, as ``file:line``."""
    return [
        f"{path.relative_to(folder)}:{line}"
        for path in sorted(folder.rglob("*.py"))
        if path.relative_to(folder).parts[0] != "bench"
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), path.stem, False)
        if inside(name, "sglang_dsv4.bench")
    ]


def test_no_test_of_the_product_takes_its_reference_from_the_benchmark(tmp_path):
    assert bench_imports(ROOT / "tests") == []
    for folder in ("cache", "bench"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_it.py").write_text("def f():\n    from sglang_dsv4.bench import timing\n")
    assert bench_imports(tmp_path) == ["cache/test_it.py:2"]
