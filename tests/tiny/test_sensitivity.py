"""The weights make attention matter: what a cache could get wrong changes the logits.

Each part is taken away, and the root mean square of what that changes is given as a fraction of the logits' own
standard deviation. 1 means that the answer has nothing left to do with the right one; a right cache stays near 0.01.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4ForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4IndexerScorer, eager_attention_forward

from sglang_dsv4.check.faults import DroppedBStream
from sglang_dsv4.tiny.tokenizer import byte_id

NUM_TOKENS = 420
# Positions with entries of every kind behind them, and tokens that have left the window.
MEASURED = slice(280, NUM_TOKENS)
CSA, HCA, WINDOW_ONLY = ("compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention")
OWN_ROW_ONLY = torch.eye(NUM_TOKENS, dtype=torch.bool)

EditMask = Callable[[nn.Module, torch.Tensor], None]


class Probe:
    """A model whose attention masks can be edited, and whose attention weights can be seen."""

    def __init__(self, checkpoint: Path) -> None:
        AttentionInterface.register("tests_tiny_probe", self._attend)
        AttentionMaskInterface.register("tests_tiny_probe", eager_mask)
        self.model = DeepseekV4ForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="tests_tiny_probe"
        )
        generator = torch.Generator().manual_seed(11)
        self.token_ids = torch.randint(byte_id(32), byte_id(127), (1, NUM_TOKENS), generator=generator)
        self.edit: EditMask | None = None
        self.weights: dict[str, list[torch.Tensor]] = {}
        self.expected = self.logits()
        self.spread = self.expected.std(dim=-1).mean().item()

    def layers(self, kind: str) -> list[nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers if layer.self_attn.layer_type == kind]

    def logits(self, edit: EditMask | None = None) -> torch.Tensor:
        """``[NUM_TOKENS, vocab]``, with the masks edited."""
        self.edit, self.weights = edit, {}
        with torch.inference_mode():
            return self.model(self.token_ids, use_cache=False).logits[0]

    def change(self, logits: torch.Tensor, expected: torch.Tensor | None = None) -> float:
        """Root mean square difference as a fraction of the spread."""
        difference = (logits - (self.expected if expected is None else expected))[MEASURED]
        return difference.square().mean().sqrt().item() / self.spread

    def _attend(self, module: nn.Module, query, key, value, mask, *, scaling: float, **_: object):
        if self.edit is not None:
            mask = mask.clone()
            self.edit(module, mask)
        output, weights = eager_attention_forward(module, query, key, value, mask, scaling=scaling)
        self.weights.setdefault(module.layer_type, []).append(weights[0, :, MEASURED])  # [H, Q, K]
        return output, weights


@pytest.fixture(scope="module")
def probe(checkpoint: Path) -> Probe:
    return Probe(checkpoint)


def without_entries(kind: str) -> EditMask:
    def edit(module: nn.Module, mask: torch.Tensor) -> None:
        if module.layer_type == kind:
            mask[..., NUM_TOKENS:] = float("-inf")

    return edit


def without_window(*kinds: str) -> EditMask:
    def edit(module: nn.Module, mask: torch.Tensor) -> None:
        if module.layer_type in kinds:
            mask[..., :NUM_TOKENS].masked_fill_(~OWN_ROW_ONLY, float("-inf"))

    return edit


@pytest.mark.parametrize(
    ("edit", "fraction"),
    [
        pytest.param(without_entries(CSA), 0.5, id="CSA entries"),
        pytest.param(without_entries(HCA), 0.3, id="HCA entries"),
        pytest.param(without_window(CSA, HCA), 0.5, id="window of compressing layers"),
        pytest.param(without_window(WINDOW_ONLY), 0.5, id="window of window-only layers"),
    ],
)
def test_taking_it_away_changes_the_logits(probe: Probe, edit: EditMask, fraction: float):
    assert probe.change(probe.logits(edit)) > fraction


def test_changing_nothing_changes_nothing(probe: Probe):
    assert probe.change(probe.logits(lambda module, mask: None)) == 0.0


def test_the_b_stream_of_one_block_changes_the_logits(probe: Probe):
    """One block of a hundred, in two layers of five."""
    with DroppedBStream(64).planted(probe.model):
        changed = probe.logits()
    assert torch.equal(changed[:259], probe.expected[:259])
    assert probe.change(changed) > 0.04


def test_the_sinks_change_the_logits(probe: Probe):
    with ExitStack() as stack:
        for layer in (kind for name in (WINDOW_ONLY, CSA, HCA) for kind in probe.layers(name)):
            right = layer.sinks.data
            layer.sinks.data = torch.full_like(right, -1e30)
            stack.callback(setattr, layer.sinks, "data", right)
        changed = probe.logits()
    assert probe.change(changed) > 0.2


def test_the_choice_of_the_indexer_changes_the_logits(probe: Probe, monkeypatch: pytest.MonkeyPatch):
    """With 16 of about 100 entries, the best-scored are others than the worst-scored, and answer otherwise."""
    for layer in probe.layers(CSA):
        monkeypatch.setattr(layer.compressor.indexer, "index_topk", 16)
    best = probe.logits()
    score = DeepseekV4IndexerScorer.forward
    monkeypatch.setattr(DeepseekV4IndexerScorer, "forward", lambda *args: -score(*args))
    assert probe.change(probe.logits(), expected=best) > 0.3


def test_neither_the_sink_nor_one_key_has_it_all(probe: Probe):
    probe.logits()
    for kind, layers in probe.weights.items():
        for weights in layers:
            sink = 1.0 - weights.sum(dim=-1).mean().item()
            entries = weights[..., NUM_TOKENS:].sum(dim=-1).mean().item()
            largest = weights.amax(dim=-1).mean().item()
            assert 0.01 < sink < 0.4, (kind, sink)
            assert largest < 0.5, (kind, largest)
            if kind != WINDOW_ONLY:
                assert 0.05 < entries < 0.9, (kind, entries)


def test_gates_are_far_from_uniform(probe: Probe):
    """Half the tokens of a block, or fewer, carry its entry: 1 / sum(w^2) is the number that would, if equal."""
    gates: dict[nn.Module, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in probe.layers(CSA) + probe.layers(HCA):
            compressor = layer.compressor
            handle = compressor.gate_proj.register_forward_hook(
                lambda module, args, output, key=compressor: gates.__setitem__(key, output[0])
            )
            stack.callback(handle.remove)
        probe.logits()
    assert len(gates) == 4
    for compressor, gate in gates.items():
        ratio, dim = compressor.compress_rate, compressor.head_dim
        blocks = gate[: len(gate) // ratio * ratio].unflatten(0, (-1, ratio)) + compressor.position_bias
        if ratio == 4:
            blocks = torch.cat([blocks[:-1, :, :dim], blocks[1:, :, dim:]], dim=1)  # [N, 8, 512]
        weights = blocks.softmax(dim=1)
        effective = (1.0 / weights.square().sum(dim=1)).mean().item()
        assert 1.5 < effective < blocks.shape[1] / 2, (ratio, effective)


def test_greedy_text_is_readable_and_not_stuck(probe: Probe):
    token_ids = probe.token_ids[:, :40]
    for _ in range(20):
        with torch.inference_mode():
            best = probe.model(token_ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()
        token_ids = torch.cat([token_ids, best.view(1, 1)], dim=1)
    generated = token_ids[0, 40:].tolist()
    assert len(set(generated)) > 5
    assert all(byte_id(0x20) <= token_id < byte_id(0x7F) for token_id in generated)


def test_the_best_token_is_mostly_clear(probe: Probe):
    best, second = probe.expected.topk(2, dim=-1).values.unbind(dim=-1)
    assert (best - second).median().item() > 0.2 * probe.spread
    assert probe.expected.argmax(dim=-1).unique().numel() > 40
