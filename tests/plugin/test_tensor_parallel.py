"""Two ranks on a CPU: each holds the whole cache and half of the heads, and the answers are those of one."""

from types import SimpleNamespace

import pytest

from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.errors import UnsupportedError
from tests.plugin.serving import generate, post, prompt, serving
from tests.plugin.test_server import check, facts_of

pytestmark = pytest.mark.sglang

RANKS = 2
EXACT = ("--dtype", "float32", "--dsv4-kv-format", "fp32", "--sleep-on-idle", "--dsv4-check", "step")
# SGLang wants to be told which cores each rank has, where there are fewer NUMA nodes than ranks.
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"}


def answers_of(server):
    """Cold prompts, one twice, and their digests by request."""
    found = {}
    for length in (5, 130, 300, 515, 515):
        found[f"{length}.{len(found)}"] = generate(server, prompt(length))
    post(server, "flush_cache?timeout=60", {})
    return found


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_answer_as_one(warm, tiny):
    oracle = Oracle(tiny)
    with serving(warm, tiny, (*EXACT, "--tp-size", str(RANKS)), variables=CORES) as server:
        found = answers_of(server)
        facts = facts_of(server)
        lines = [line for line in server.log_lines() if "sglang_dsv4 active:" in line]
    with serving(warm, tiny, EXACT) as single:
        alone = answers_of(single)
        alone_facts = facts_of(single)
    assert len(lines) == RANKS and all(f"TP{rank}]" in "".join(lines) for rank in range(RANKS))
    # The cache is whole in each rank: the same bytes as without ranks, and not half of them.
    assert facts["report"]["bytes_by_pool"] == alone_facts["report"]["bytes_by_pool"]
    assert facts["checks"]["failed"] == 0 and facts["checks"]["run"] > 0
    for name, answer in found.items():
        bound = check(oracle, prompt(int(name.partition(".")[0])), answer)
        assert answer[2] == alone[name][2]
        assert (answer[1] - alone[name][1]).abs().max().item() <= 2 * bound
    # The twin: another prompt's answer is further away than that.
    short, long = found["300.2"], alone["515.3"]
    assert (short[1] - long[1]).abs().max().item() > 2 * bound


@pytest.mark.parametrize(("heads", "groups", "named"), [(9, 2, "num_attention_heads=9"), (8, 3, "o_groups=3")])
def test_heads_that_cannot_be_split_are_refused(heads, groups, named):
    from sglang_dsv4.plugin.install.portable.config_ops import keep_heads

    config = SimpleNamespace(num_attention_heads=heads, o_groups=groups)
    model_config = SimpleNamespace(hf_config=config)
    with pytest.raises(UnsupportedError, match=f"--tp-size 2: expected a divisor of {named}"):
        keep_heads(model_config, None, RANKS)
    assert keep_heads(model_config, None, 1) is model_config
