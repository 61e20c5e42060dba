"""Which weights a model computes with, in a few characters."""

import hashlib
import json

import torch
from torch import nn

_SAMPLES = 64
# Fields of a config that say where it came from, and nothing of what is computed.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def fingerprint(model: nn.Module) -> str:
    """A digest of the config, of every tensor's name, shape and dtype, and of values spread over each.

    Two models with the same digest answer alike, but for weights that differ in single values only. The dtype is that in which
    the model computes, so the same checkpoint in bfloat16 and in float32 has two.

    Args:
        model (nn.Module): of transformers, with its ``config``.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().reshape(-1)
        if len(values):
            places = torch.linspace(0, len(values) - 1, min(_SAMPLES, len(values)), dtype=torch.float64, device=values.device)
            digest.update(values[places.long()].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
