"""What SGLang makes of a model's configuration before it is loaded on a CPU."""

from typing import Any

from sglang_dsv4.errors import UnsupportedError


def keep_heads(model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Leave the configuration as it is: query heads are split over the ranks, and each holds the one row of keys.

    Args:
        model_config (Any): SGLang's ModelConfig.
        load_config (Any): unused.
        tp_size (int): ranks.

    Returns:
        Any: ``model_config``.

    Raises:
        UnsupportedError: heads or output groups cannot be split evenly.
    """
    del load_config
    config = model_config.hf_config
    for name in ("num_attention_heads", "o_groups"):
        if getattr(config, name) % tp_size:
            raise UnsupportedError(f"--tp-size {tp_size}: expected a divisor of {name}={getattr(config, name)}")
    return model_config
