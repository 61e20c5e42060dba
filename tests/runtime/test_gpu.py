"""The runtime on a GPU: the same code, held against the CPU runtime in exact arithmetic and rows."""

import pytest
import torch

from tests.cache.driver import reachable_bytes
from tests.runtime.worlds import assert_nothing_held, bound, logprobs_behind, make_runtime, make_tokens

pytestmark = pytest.mark.gpu


@pytest.fixture
def runtimes(small_checkpoint):
    """One on the CPU and one on the GPU; matrix products of the GPU in full fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield [make_runtime(small_checkpoint, device=device, debug=True) for device in ("cpu", "cuda")]
    torch.backends.cuda.matmul.allow_tf32 = before


def assert_alike(small_oracle, handles):
    """Both are as far from exact as fp32 arithmetic explains, so from each other twice that."""
    cpu, gpu = handles
    assert cpu.tokens == gpu.tokens
    error = (logprobs_behind(cpu) - logprobs_behind(gpu).cpu()).abs().max().item()
    assert error <= 2 * bound(small_oracle, list(cpu.tokens))


@pytest.mark.parametrize("length", [5, 128, 131, 261])
def test_cuts_on_a_gpu(runtimes, small_oracle, tmp_path, length):
    trunks = [runtime.open(make_tokens(length)) for runtime in runtimes]
    assert_alike(small_oracle, trunks)
    twins = [trunk.fork().append(make_tokens(140, salt=1)) for trunk in trunks]
    assert_alike(small_oracle, twins)
    kept = [trunk.snapshot() for trunk in trunks]
    for trunk in trunks:
        trunk.append(make_tokens(6, salt=2)).truncate(length + 1).append(make_tokens(9, salt=3))
    assert_alike(small_oracle, trunks)
    restored = [r.restore(k).append(make_tokens(7, salt=4)) for r, k in zip(runtimes, kept, strict=True)]
    assert_alike(small_oracle, restored)
    for runtime in runtimes:
        runtime.cache.check_integrity(memory=True)


def test_saved_on_one_and_loaded_on_the_other(runtimes, small_oracle, tmp_path):
    """The bytes that were saved are those that are loaded, and both go on from them alike."""
    for number, (source, target) in enumerate((runtimes, runtimes[::-1])):
        handle = source.open(make_tokens(261, salt=number))
        source.save(handle, tmp_path / f"{number}.dsv4kv")
        loaded = target.load(tmp_path / f"{number}.dsv4kv")
        for part, stored in reachable_bytes(source.cache, handle.live().request).items():
            assert reachable_bytes(target.cache, loaded.live().request)[part] == stored
        more = make_tokens(140, salt=5)
        pair = [handle.append(more), loaded.append(more)]
        pair = pair if source is runtimes[0] else pair[::-1]
        assert_alike(small_oracle, pair)


def test_generation_and_a_failed_step_on_a_gpu(runtimes, monkeypatch):
    _, runtime = runtimes
    prompts = [make_tokens(length, salt=6) for length in (3, 130, 257)]
    first = runtime.generate(prompts, 8, stop=(), progress=False)
    again = runtime.generate(prompts, 8, stop=(), progress=False)
    assert [done.tokens for done in first] == [done.tokens for done in again]
    handle = runtime.open(prompts[1])
    before = reachable_bytes(runtime.cache, handle.live().request)
    layer = runtime.engine.model.model.model.layers[1]

    def fail(*args, **kwargs):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device lost"):
        patch.setattr(layer.mlp, "forward", fail)
        handle.append(make_tokens(40, salt=7))
    assert reachable_bytes(runtime.cache, handle.live().request) == before
    handle.close()
    assert_nothing_held(runtime)


def test_every_tensor_is_on_the_gpu(runtimes):
    _, runtime = runtimes
    for layer in runtime.cache.storage.layers:
        for tensors in layer.tensors().values():
            assert all(tensor.is_cuda for tensor in tensors)
    assert all(weight.is_cuda for weight in runtime.engine.model.model.parameters())


def test_a_token_that_is_missing_is_noticed(runtimes, small_oracle):
    """The twin of `assert_alike`."""
    handles = [runtimes[0].open(make_tokens(131)), runtimes[1].open([*make_tokens(130), 40])]
    error = (logprobs_behind(handles[0]) - logprobs_behind(handles[1]).cpu()).abs().max().item()
    assert error > 2 * bound(small_oracle, make_tokens(131))
