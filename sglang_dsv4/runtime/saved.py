"""What a saved sequence carries beside the cache's rows: its tokens, and what follows them."""

import base64
import json

import torch

from sglang_dsv4.runtime.sequence import LiveSequence

_TOKENS, _LOGITS = "tokens", "logits"


def pack_sequence(sequence: LiveSequence) -> dict[str, str]:
    """Small strings for `CompressedKVCache.save`: token ids as JSON, logits as base64 of fp32."""
    packed = {_TOKENS: json.dumps(sequence.tokens)}
    if sequence.logits is not None and not sequence.num_pending:
        values = sequence.logits.cpu().numpy().astype("<f4").tobytes()
        packed[_LOGITS] = base64.b64encode(values).decode()
    return packed


def unpack_sequence(packed: dict[str, str], num_fed: int, device: torch.device) -> LiveSequence | None:
    """The sequence, without its request; None where `pack_sequence` did not make the strings.

    Args:
        packed (dict[str, str]): from `CompressedKVCache.load`.
        num_fed (int): tokens that the cache holds.
        device (torch.device): where the logits go.
    """
    if _TOKENS not in packed:
        return None
    sequence = LiveSequence([int(token) for token in json.loads(packed[_TOKENS])])
    if len(sequence.tokens) < num_fed:
        return None
    if _LOGITS in packed:
        values = bytearray(base64.b64decode(packed[_LOGITS]))
        sequence.logits = torch.frombuffer(values, dtype=torch.float32).to(device)
    return sequence
