"""How strongly a tiny checkpoint's layers answer to what they read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scales:
    """Sizes of the weights that decide what a difference in the cache does to the logits.

    Attributes:
        window_key_norm (float): of window rows, per channel.
        csa_key_norm (float): of CSA entries.
        hca_key_norm (float): of HCA entries.
        attention_gain (float): of attention's output projection.
        routed_expert_gain (float): small: which experts a token goes to is a discrete choice, and where two gates are nearly
            equal a rounding error of the cache flips it. A flip must not be mistaken for a wrong cache.
    """

    window_key_norm: float
    csa_key_norm: float
    hca_key_norm: float
    attention_gain: float
    routed_expert_gain: float


# `sharp` is for arithmetic in fp32: attention is selective, and one wrong entry shows. In bf16 it multiplies rounding, too:
# with fp8 rows, log-probabilities typically move by 0.3, and hardly any token is certain. `calm` is for servers that
# compute in bf16: a seventh of that, while a wrong page still moves them by twenty times as much as rounding does.
SCALES = {"sharp": Scales(1.5, 2.5, 3.0, 2.0, 0.1), "calm": Scales(0.8, 0.8, 1.0, 3.5, 0.03)}
