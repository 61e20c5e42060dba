"""P2: entries and index keys agree with transformers' compressors and with an independent computation in fp64."""

import math

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACompressor, DeepseekV4HCACompressor

from dsv4_kernels.hadamard import naive_hadamard
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.streams import slot_bias
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.regions import Kind, Part
from tests.cache.driver import CONFIG, CompressorInput, WindowInput, append, make_spec

HIDDEN = 64
LENGTHS = [*range(1, 21), *range(123, 134), *range(251, 262), *range(379, 390), 517, 640]
# One rounding to bf16, which has 8 significand bits: half a unit in the last place, relative to the value.
BF16_ROUNDING = 2.0**-8
# fp32 arithmetic before it: about 300 roundings of 2^-24 (128 recurrence steps of two roundings, norm, RoPE), relative to
# the largest value of the row, since RoPE and Hadamard mix channels.
FP32_ARITHMETIC = 300 * 2.0**-24


@pytest.fixture(scope="module")
def model():
    """Transformers' compressors with random weights, in fp64 where it lets us, and the hidden states of one sequence."""
    torch.manual_seed(3)
    config = DeepseekV4Config(
        **{key: value for key, value in CONFIG.items() if key != "model_type"},
        hidden_size=HIDDEN,
        q_lora_rank=32,
        index_n_heads=4,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=65536,
    )
    csa, hca = DeepseekV4CSACompressor(config), DeepseekV4HCACompressor(config)
    for module in (csa, csa.indexer, hca):
        torch.nn.init.normal_(module.position_bias)
        torch.nn.init.uniform_(module.kv_norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(module.kv_proj.weight, std=0.2)
        torch.nn.init.normal_(module.gate_proj.weight, std=0.3)
    x = torch.randn(1, max(LENGTHS), HIDDEN)
    return csa, hca, x


def projections(module, x):
    weight = torch.cat([module.kv_proj.weight, module.gate_proj.weight])
    return (x[0] @ weight.T).detach()


def fill(model, length, swap_halves=False):
    """Our cache after a full forward of ``length`` tokens."""
    csa, hca, x = model
    spec = make_spec()
    cache = CompressedKVCache(spec, num_pages=3, max_requests=1)
    request = cache.open()
    plan = cache.plan([(request, length)])

    def given(module, dim):
        kv_score = projections(module, x[:, :length])
        bias = slot_bias(module.position_bias.detach(), dim)
        if swap_halves and kv_score.shape[1] == 4 * dim:
            kv_score = kv_score.view(length, 2, 2, dim).flip(2).reshape(length, -1)
            bias = bias.view(2, -1, dim).flip(0).reshape(-1, dim)
        return CompressorInput(kv_score, bias, module.kv_norm.weight.detach(), module.kv_norm.variance_epsilon)

    window = WindowInput(torch.randn(length, 512), torch.ones(512), 1e-6)
    append(cache, 0, plan, window=window)
    append(cache, 1, plan, window=window, main=given(csa, 512), index=given(csa.indexer, 128))
    append(cache, 2, plan, window=window, main=given(hca, 512))
    cache.commit(plan)
    return cache, request


def stored(cache, request, layer_id, index=False):
    layer = cache.layers[layer_id]
    ratio, page_tokens = layer.ratio, cache.spec.page_tokens
    entries = torch.arange(request.num_entries(ratio))
    per_page = page_tokens // ratio
    rows = torch.tensor(request.pages.history)[entries // per_page] * per_page + entries % per_page
    if index:
        return naive_load_rows(layer.memory.storage.tensor(Kind.INDEX_KEY, Part.INDEX), rows, cache.spec.index_keys)
    return naive_load_rows(layer.memory.storage.pool, cache.storage.num_window_rows + rows, cache.spec.rows)


def transformers_entries(module, x, index=False):
    """The entries a full forward of transformers pools, before selection."""
    length = x.shape[1]
    position_ids = torch.arange(length).unsqueeze(0)
    if not index:
        latent = torch.zeros(1, length, 32)
        return module(x, latent, position_ids, None, 0)[0][0, 0].detach()
    captured = []
    hook = module.scorer.register_forward_pre_hook(lambda _, args: captured.append(args[1]))
    module(x, torch.zeros(1, length, 32), position_ids, None, 0)
    hook.remove()
    return captured[0][0].detach()


def fp64_entries(module, x, overlap, dim):
    """Independent: loops over blocks and slots in fp64, from the report's equations alone."""
    kv = x[0].double() @ module.kv_proj.weight.double().T
    gate = x[0].double() @ module.gate_proj.weight.double().T
    bias = module.position_bias.double()
    ratio = len(bias)
    rows = []
    for block in range(len(kv) // ratio):
        slots = []
        for offset in range(ratio):
            if overlap and block:
                token = (block - 1) * ratio + offset
                slots.append((kv[token, :dim], gate[token, :dim] + bias[offset, :dim]))
        for offset in range(ratio):
            token = block * ratio + offset
            own = slice(dim, None) if overlap else slice(None)
            slots.append((kv[token, own], gate[token, own] + bias[offset, own]))
        weight = torch.stack([z for _, z in slots]).softmax(dim=0)
        raw = (weight * torch.stack([c for c, _ in slots])).sum(dim=0)
        normed = raw / (raw.square().mean() + 1e-6).sqrt() * module.kv_norm.weight.double()
        rows.append(rotate(normed, block * ratio))
    return torch.stack(rows).detach() if rows else torch.zeros(0, dim, dtype=torch.float64)


def rotate(row, position):
    """Interleaved RoPE of the last 64 channels with YaRN 16 on base 160000, written out."""
    row = row.clone()
    for pair in range(32):
        freq = 160000.0 ** (-2 * pair / 64)
        # Correction range of 32 and 1 rotations over 65536 positions: pairs 15 to 25.
        ramp = min(max((pair - 15) / 10, 0.0), 1.0)
        angle = position * (freq * (1 - ramp) + freq / 16 * ramp)
        i = len(row) - 64 + 2 * pair
        a, b = row[i].item(), row[i + 1].item()
        row[i] = a * math.cos(angle) - b * math.sin(angle)
        row[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return row


def excess(found, expected, angle_error=0.0):
    """Largest error beyond the allowed one; at most 0 when they agree.

    ``angle_error``: RoPE angles are fp32 products of a position below 1024 and a frequency with two roundings: 3 * 2^-24
    relative, up to 1024 radians.
    """
    expected = expected.double()
    scale = expected.abs().amax(dim=1, keepdim=True)
    allowed = BF16_ROUNDING * expected.abs() + (FP32_ARITHMETIC + angle_error) * scale
    return ((found.double() - expected).abs() - allowed).max().item() if len(expected) else 0.0


ANGLE_ERROR = 1024 * 3 * 2.0**-24


@pytest.mark.parametrize("length", LENGTHS)
def test_entries_match_transformers(model, length):
    csa, hca, x = model
    cache, request = fill(model, length)
    assert excess(stored(cache, request, 1), transformers_entries(csa, x[:, :length]), ANGLE_ERROR) <= 0
    assert excess(stored(cache, request, 2), transformers_entries(hca, x[:, :length]), ANGLE_ERROR) <= 0
    keys = naive_hadamard(transformers_entries(csa.indexer, x[:, :length], index=True))
    assert excess(stored(cache, request, 1, index=True), keys, ANGLE_ERROR) <= 0


@pytest.mark.parametrize("length", [3, 4, 7, 8, 131, 261, 640])
def test_entries_match_fp64(model, length):
    csa, hca, x = model
    cache, request = fill(model, length)
    x = x[:, :length]
    assert excess(stored(cache, request, 1), fp64_entries(csa, x, True, 512), ANGLE_ERROR) <= 0
    assert excess(stored(cache, request, 2), fp64_entries(hca, x, False, 512), ANGLE_ERROR) <= 0
    keys = fp64_entries(csa.indexer, x, True, 128)
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]).double()
    assert excess(stored(cache, request, 1, index=True), keys @ signs / 128**0.5, ANGLE_ERROR) <= 0


def test_swapped_halves_are_noticed(model):
    csa, _, x = model
    cache, request = fill(model, 640, swap_halves=True)
    assert excess(stored(cache, request, 1), transformers_entries(csa, x), ANGLE_ERROR) > 0.1


@pytest.mark.parametrize("broken", ["position_bias", "previous_block", "last_position"])
def test_each_trap_is_noticed(model, broken):
    """Every entry but the first must move by far more than the tolerance when one convention is wrong."""
    csa, _, x = model
    cache, request = fill(model, 640)
    expected = fp64_entries(csa, x, True, 512)
    if broken == "position_bias":
        kept = csa.position_bias.data.clone()
        csa.position_bias.data.zero_()
        wrong = fp64_entries(csa, x, True, 512)
        csa.position_bias.data.copy_(kept)
    elif broken == "previous_block":
        wrong = torch.cat([fp64_entries(csa, x[:, 4 * i : 4 * i + 4], True, 512) for i in range(160)])
    else:
        wrong = torch.stack([rotate(rotate_back(row, 4 * i), 4 * i + 3) for i, row in enumerate(expected)])
    found = stored(cache, request, 1)
    assert all(excess(found[i : i + 1], wrong[i : i + 1], ANGLE_ERROR) > 0 for i in range(1, 160))


def rotate_back(row, position):
    back = rotate(row, -position)
    return back
