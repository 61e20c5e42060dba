"""The faults of `make mutations` are still faults of this source: each line stands where it is said to, and its test exists."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = json.loads((ROOT / "tests" / "mutations.json").read_text(encoding="utf-8"))


def test_every_fault_has_its_line_and_its_test():
    assert len(FAULTS) > 100
    for fault in FAULTS:
        source = (ROOT / fault["file"]).read_text(encoding="utf-8")
        assert source.count(fault["old"]) == 1, f"{fault['file']}: {fault['old']!r}"
        assert fault["new"] != fault["old"]
        for test in fault["test"].split():
            if not test.startswith("-") and test.startswith("tests"):
                path, _, name = test.partition("::")
                assert (ROOT / path).exists(), test
                assert not name or name.partition("[")[0].rpartition("::")[2] in (ROOT / path).read_text(encoding="utf-8"), test
