"""What a saved sequence carries beside the cache's rows: its tokens, what follows them, and the weights that computed both."""

import base64
import json
from binascii import Error as Base64Error

import torch

from sglang_dsv4.runtime.sequence import LiveSequence

_TOKENS, _LOGITS, WEIGHTS = "tokens", "logits", "weights"
_FLOAT_BYTES = 4


def pack_sequence(sequence: LiveSequence, weights: str) -> dict[str, str]:
    """Small strings for `CompressedKVCache.save`: token ids as JSON, logits as base64 of fp32, and the weights' digest."""
    packed = {_TOKENS: json.dumps(sequence.tokens), WEIGHTS: "" if sequence.is_foreign else weights}
    if sequence.logits is not None and not sequence.num_pending:
        values = sequence.logits.cpu().numpy().astype("<f4").tobytes()
        packed[_LOGITS] = base64.b64encode(values).decode()
    return packed


def unpack_sequence(packed: dict[str, str], num_fed: int, vocab_size: int, device: torch.device) -> LiveSequence:
    """The sequence, without its request.

    Args:
        packed (dict[str, str]): from `CompressedKVCache.load`.
        num_fed (int): tokens that the cache holds.
        vocab_size (int): token ids are below it, and logits are as many.
        device (torch.device): where the logits go.

    Raises:
        ValueError: `pack_sequence` of such a vocabulary did not make the strings; the message says what is wrong.
    """
    if _TOKENS not in packed:
        raise ValueError("no tokens")
    try:
        tokens = json.loads(packed[_TOKENS])
    except ValueError as error:
        raise ValueError(f"tokens that cannot be read as JSON: {error}") from error
    if not isinstance(tokens, list) or len(tokens) < num_fed or not all(_is_id(token, vocab_size) for token in tokens):
        raise ValueError(f"tokens other than {num_fed} or more ids of 0 .. {vocab_size - 1}")
    sequence = LiveSequence(tokens)
    if _LOGITS in packed:
        try:
            values = bytearray(base64.b64decode(packed[_LOGITS], validate=True))
        except Base64Error as error:
            raise ValueError(f"logits that are no base64: {error}") from error
        if len(values) != _FLOAT_BYTES * vocab_size or len(tokens) != num_fed:
            raise ValueError(f"logits of other than {vocab_size} values behind the last token")
        sequence.logits = torch.frombuffer(values, dtype=torch.float32).to(device)
    return sequence


def _is_id(token: object, vocab_size: int) -> bool:
    return type(token) is int and 0 <= token < vocab_size
