"""Eager attention over the cache against transformers' attention module, layer by layer, whatever the chunking."""

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
    apply_rotary_pos_emb,
)

from dsv4_kernels.norm_rope import naive_rope
from dsv4_kernels.streams import slot_bias
from sglang_dsv4.attention import EagerAttention
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.spec import CacheSpec
from tests.cache.driver import CONFIG, CompressorInput, WindowInput, append, make_spec

LENGTH = 391
KINDS = ["window", "csa", "hca"]


def make_config(index_topk):
    return DeepseekV4Config(
        **{key: value for key, value in CONFIG.items() if key not in ("model_type", "index_topk")},
        index_topk=index_topk,
        hidden_size=64,
        q_lora_rank=32,
        index_n_heads=8,
        num_attention_heads=4,
        o_groups=2,
        o_lora_rank=16,
        vocab_size=64,
        max_position_embeddings=65536,
        attn_implementation="eager",
    )


class Model:
    """One transformers attention layer, its inputs, and what it gives before the output projection."""

    def __init__(self, layer_id, index_topk=512):
        torch.manual_seed(layer_id)
        self.config = make_config(index_topk)
        self.module = DeepseekV4Attention(self.config, layer_id)
        for name, parameter in self.module.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=1.0 if "bias" in name or "sinks" in name else 0.2)
        self.x = torch.randn(1, LENGTH, 64)
        self.positions = torch.arange(LENGTH).unsqueeze(0)
        rotary = DeepseekV4RotaryEmbedding(self.config)
        self.rope = {kind: rotary(self.x, position_ids=self.positions, layer_type=kind) for kind in ("main", "compress")}

    @torch.no_grad()
    def forward(self, round_rows=False):
        """``[T, H, 512]``, rotated back; with rows rounded to bf16 as the cache stores them, or exact."""
        distance = self.positions[0].unsqueeze(1) - self.positions[0]
        mask = torch.where((distance >= 0) & (distance < 128), 0.0, float("-inf"))[None, None]
        captured, hooks = [], []
        hooks.append(self.module.o_a_proj.register_forward_pre_hook(lambda _, args: captured.append(args[0])))
        if round_rows:
            norms = [self.module.kv_norm] + ([self.module.compressor.kv_norm] if self.module.compressor else [])
            hooks += [norm.register_forward_hook(lambda *args: args[2].bfloat16().float()) for norm in norms]
        self.module(self.x, self.rope, self.positions, mask)
        for hook in hooks:
            hook.remove()
        return captured[0].reshape(LENGTH, 4, 512)

    @torch.no_grad()
    def queries(self):
        module = self.module
        latent = module.q_a_norm(module.q_a_proj(self.x))
        q = module.q_b_norm(module.q_b_proj(latent).view(1, LENGTH, 4, 512).transpose(1, 2))
        return apply_rotary_pos_emb(q, *self.rope[module.rope_layer_type])[0].transpose(0, 1), latent[0]


def compressor_input(compressor, x, dim):
    weight = torch.cat([compressor.kv_proj.weight, compressor.gate_proj.weight]).detach()
    bias = slot_bias(compressor.position_bias.detach(), dim)
    return CompressorInput(x @ weight.T, bias, compressor.kv_norm.weight.detach(), 1e-6)


def run_ours(model, layer_id, cuts, index_topk=512, shift=0):
    """Our cache and eager attention over the same inputs, step by step."""
    spec = CacheSpec.from_hf(model.config)
    spec = CacheSpec(layers=spec.layers, index_topk=index_topk)
    cache = CompressedKVCache(spec, num_pages=2, max_requests=1)
    attention, request = EagerAttention(cache), cache.open()
    q, latent = model.queries()
    outputs, chosen = [], []
    for count in cuts:
        begin, end = request.seq_len, request.seq_len + count
        x, module = model.x[0, begin:end], model.module
        plan = cache.plan([(request, count)])
        with torch.no_grad():
            parts = {"window": WindowInput(module.kv_proj(x), module.kv_norm.weight, 1e-6)}
            if module.compressor is not None:
                parts["main"] = compressor_input(module.compressor, x, 512)
            selected = None
            if layer_id == 1:
                indexer = module.compressor.indexer
                parts["index"] = compressor_input(indexer, x, 128)
            append(cache, layer_id, plan, **parts)
            if layer_id == 1:
                index_q = indexer.q_b_proj(latent[begin:end]).view(-1, 8, 128)
                weights = indexer.scorer.weights_proj(x) * (128**-0.5 * 8**-0.5)
                selected = cache.layers[layer_id].select(plan, index_q, weights)
                chosen.append(selected - cache.storage.num_window_rows)  # pages are handed out in order: entry numbers
            attention.begin(plan)
            out = attention.run(cache.layers[layer_id], q[begin:end], module.sinks, selected)
        table = cache.layers[layer_id].rope_table
        outputs.append(naive_rope(out, table[torch.arange(begin, end) + shift], inverse=True))
        for other, layer in enumerate(cache.layers):  # the other layers of the step, so that it can be committed
            plan.appended.update((other, part) for part in layer.parts)
        cache.commit(plan)
    return torch.cat(outputs), chosen


@pytest.mark.parametrize("layer_id", range(3), ids=KINDS)
@pytest.mark.parametrize(
    "cuts", [[LENGTH], [3, 1, 124, 1, 127, 1, 134], [1] * 20 + [LENGTH - 20]], ids=["full", "cut", "decode"]
)
def test_matches_transformers(layer_id, cuts):
    """At most twice as wrong as transformers itself when its rows are rounded to bf16, plus fp32 noise."""
    model = Model(layer_id)
    exact, rounded = model.forward(), model.forward(round_rows=True)
    allowed = 2 * (rounded - exact).abs().max() + 512 * 2.0**-24 * exact.abs().max()
    found, _ = run_ours(model, layer_id, cuts)
    assert (found - exact).abs().max() <= allowed
    assert (run_ours(model, layer_id, cuts, shift=1)[0] - exact).abs().max() > allowed


@pytest.mark.parametrize("layer_id", [1, 2], ids=KINDS[1:])
def test_a_block_seen_one_token_late_is_noticed(layer_id, monkeypatch):
    """The twin: entries visible from the token after their block, as the report's text has it."""
    from sglang_dsv4.cache.step_rows import StepRows

    model = Model(layer_id)
    exact, rounded = model.forward(), model.forward(round_rows=True)
    allowed = 2 * (rounded - exact).abs().max() + 512 * 2.0**-24 * exact.abs().max()
    monkeypatch.setattr(StepRows, "num_visible", lambda self, ratio: self.step.positions // ratio)
    found, _ = run_ours(model, layer_id, [LENGTH])
    assert (found - exact).abs().max() > allowed


@pytest.mark.parametrize("cuts", [[LENGTH], [130, 1, 1, 4, LENGTH - 136]], ids=["full", "cut"])
def test_selection_matches_transformers_away_from_ties(cuts):
    """Every entry that transformers scores above its k-th by more than rounding is chosen, none below by more.

    Index keys are stored in bf16: |error of a score| <= sum_h |w_h| |q_h| 2^-8 |k|.
    """
    topk = 16
    model = Model(1, index_topk=topk)
    captured = []
    scorer = model.module.compressor.indexer.scorer
    hook = scorer.register_forward_hook(lambda _, args, out: captured.append((args, out)))
    model.forward()
    hook.remove()
    (q, keys, hidden), scores = captured[0]
    weights = scorer.weights_proj(hidden)[0].abs() * (128**-0.5 * 8**-0.5)
    slack = (weights * q[0].norm(dim=-1)).sum(-1) * 2.0**-8 * keys[0].norm(dim=-1).max()
    _, chosen = run_ours(model, 1, cuts, index_topk=topk)
    found = [row[row >= 0].tolist() for part in chosen for row in part]
    binding = 0
    for token, entries in enumerate(found):
        visible = (token + 1) // 4
        assert entries == sorted(entries) and len(entries) == min(topk, visible)
        if visible > topk:
            row = scores[0, token, :visible]
            kth = row.topk(topk).values[-1]
            must = set(torch.nonzero(row > kth + slack[token]).flatten().tolist())
            may = set(torch.nonzero(row >= kth - slack[token]).flatten().tolist())
            assert must <= set(entries) <= may
            binding += len(may) < visible
    assert binding > 200  # the rule excludes something nearly everywhere


def test_selected_rows_are_asked_for_exactly_in_csa_layers():
    cache = CompressedKVCache(make_spec(), num_pages=1, max_requests=1)
    attention, request = EagerAttention(cache), cache.open()
    attention.begin(cache.plan([(request, 2)]))
    q, sink = torch.randn(2, 4, 512), torch.zeros(4)
    with pytest.raises(ValueError, match="layer 1: expected selected rows exactly in CSA layers, got none"):
        attention.run(cache.layers[1], q, sink)
    with pytest.raises(ValueError, match="got some"):
        attention.run(cache.layers[0], q, sink, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer 0 q: expected 2 tokens, got 3"):
        attention.run(cache.layers[0], torch.randn(3, 4, 512), sink)


@pytest.mark.parametrize("layer_id", [0, 2])
def test_the_rotation_can_be_undone(layer_id):
    cache = CompressedKVCache(make_spec(), num_pages=1, max_requests=1)
    attention, request = EagerAttention(cache), cache.open()
    plan = cache.plan([(request, 5)])
    window = WindowInput(torch.randn(5, 512), torch.ones(512), 1e-6)
    append(cache, layer_id, plan, window=window)
    attention.begin(plan)
    q, sink = torch.randn(5, 4, 512), torch.randn(4)
    rotated = attention.run(cache.layers[layer_id], q, sink)
    table = cache.layers[layer_id].rope_table
    expected = naive_rope(rotated, table[torch.arange(5)], inverse=True)
    assert torch.equal(attention.run(cache.layers[layer_id], q, sink, undo_rope=True), expected)
    assert not torch.equal(rotated, expected)
