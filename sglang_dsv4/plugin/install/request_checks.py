"""What a request may not ask for."""

from typing import Any

_EMBEDDINGS = ("input_embeds", "replace_embeds", "positional_embed_overrides")


def check_request(result: None, manager: Any, obj: Any, input_ids: list[int] | None, *_: Any) -> None:
    """Hook after ``TokenizerManager._validate_one_request``; SGLang answers 400 with the sentence.

    Args:
        result (None): of SGLang's own check.
        manager (Any): SGLang's TokenizerManager.
        obj (Any): the request.
        input_ids (list[int] | None): its prompt.

    Raises:
        ValueError: embeddings instead of tokens, which SGLang's model would not read and whose experts it could not choose; or
            an id outside the vocabulary, which would end the server.
    """
    for name in _EMBEDDINGS:
        if getattr(obj, name, None) is not None:
            raise ValueError(f"{name}: not supported; DeepSeek-V4 chooses experts by token id, so it needs input_ids or text")
    vocab_size = manager.model_config.vocab_size
    for token_id in input_ids or ():
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"input_ids: expected ids of 0 .. {vocab_size - 1}, got {token_id}")
