"""Faults to plant in the oracle: what a broken cache would compute. A check that does not notice them checks nothing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACompressor, apply_rotary_pos_emb


@dataclass(frozen=True)
class DroppedBStream:
    """One CSA entry is pooled without the previous block, in every CSA layer.

    That is what a prefix hit gives when the boundary state does not come with it.

    Attributes:
        entry (int): the entry; its first token is ``4 * entry``.
    """

    entry: int

    @contextmanager
    def planted(self, model: nn.Module) -> Iterator[None]:
        """Within the block, ``model`` computes the wrong entry."""
        with ExitStack() as stack:
            for compressor in _csa_compressors(model):
                handle = compressor.register_forward_hook(self._replace_entry, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _replace_entry(self, compressor: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        del kwargs
        entries, bias = output  # [1, 1, E, D]
        if entries.shape[2] <= self.entry:
            return output
        dim, ratio = compressor.head_dim, compressor.compress_rate
        first = self.entry * ratio
        hidden = args[0][:, first : first + ratio]  # [1, ratio, hidden]
        values = compressor.kv_proj(hidden)[..., dim:]
        gate = compressor.gate_proj(hidden)[..., dim:] + compressor.position_bias[:, dim:]
        weights = gate.softmax(dim=1, dtype=torch.float32).to(values.dtype)
        entry = compressor.kv_norm((values * weights).sum(dim=1, keepdim=True))  # [1, 1, D]
        position = torch.tensor([[first]], device=hidden.device)
        cos, sin = compressor.rotary_emb(entry, position_ids=position, layer_type="compress")
        entries = entries.clone()
        entries[:, :, self.entry] = apply_rotary_pos_emb(entry.unsqueeze(1), cos, sin)[:, :, 0]
        return entries, bias


@dataclass(frozen=True)
class SwappedStreams:
    """The two streams of every CSA layer are taken for each other."""

    @contextmanager
    def planted(self, model: nn.Module) -> Iterator[None]:
        """Within the block, ``model`` pools the wrong stream into the wrong block."""
        compressors = _csa_compressors(model)
        for compressor in compressors:
            self._swap(compressor)
        try:
            yield
        finally:
            for compressor in compressors:
                self._swap(compressor)

    @staticmethod
    def _swap(compressor: nn.Module) -> None:
        dim = compressor.head_dim
        with torch.no_grad():
            for parameter, axis in (
                (compressor.kv_proj.weight, 0),
                (compressor.gate_proj.weight, 0),
                (compressor.position_bias, 1),
            ):
                parameter.copy_(parameter.roll(dim, dims=axis))


Fault = DroppedBStream | SwappedStreams


def _csa_compressors(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, DeepseekV4CSACompressor)]
