"""`sglang.Engine` with ``SGLANG_DSV4_COMPRESSED_KV=1``, and no other setting."""

import subprocess
import sys

import pytest

from sglang_dsv4 import env
from sglang_dsv4.tiny import TinySpec, write_tiny_checkpoint

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SCRIPT = """
import sys
if __name__ == "__main__":
    import sglang
    engine = sglang.Engine(
        model_path=sys.argv[1], max_total_tokens=16384, swa_full_tokens_ratio=0.5, max_running_requests=8
    )
    greedy = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    first = engine.generate(input_ids=[[10, 11, 12], [20] * 300], sampling_params=greedy)
    again = engine.generate(input_ids=[[20] * 300], sampling_params=greedy)
    assert [answer["meta_info"]["completion_tokens"] for answer in first] == [6, 6]
    assert again[0]["meta_info"]["cached_tokens"] == 256
    print("ENGINE", engine.get_server_info()["internal_states"][0]["sglang_dsv4"]["cache"])
    engine.shutdown()
"""


def test_the_variable_is_enough(tmp_path):
    tiny, script = tmp_path / "tiny", tmp_path / "script.py"
    write_tiny_checkpoint(tiny, TinySpec())
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(tiny)],
        capture_output=True,
        text=True,
        env={**env.snapshot(), env.COMPRESSED_KV: "1", "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert "ENGINE CompressedKVCache" in run.stdout, (run.stdout + run.stderr)[-3000:]
