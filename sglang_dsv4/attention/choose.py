"""Which attention a cache gets, and why."""

from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.eager import EagerAttention
from sglang_dsv4.attention.requirements import Capabilities, find_capabilities
from sglang_dsv4.attention.row_list_kinds import FixedShape
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache
from sglang_dsv4.errors import UnsupportedError

NAMES = ("eager", "flashinfer", "flashmla")
# FlashMLA reads packed rows in the pool; FlashInfer has them decoded first, but runs on every generation of GPU.
_FASTEST_FIRST = ("flashmla", "flashinfer", "eager")


def name_attention(name: str | None, capabilities: Capabilities) -> tuple[str, str]:
    """Choose an implementation without loading it.

    Args:
        name (str | None): of `NAMES`; None takes the fastest that is possible.
        capabilities (Capabilities): the machine, the packages and the cache.

    Returns:
        tuple[str, str]: its name, and the reason in a few words.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: the named one is not possible; the message says why.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"attention: expected one of {NAMES}, got {name!r}")
    if name is not None:
        fault = capabilities.why_not(name)
        if fault:
            raise UnsupportedError(f"attention {name}: {fault}")
        return name, "asked for"
    faults = {name: capabilities.why_not(name) for name in _FASTEST_FIRST}
    best = next(name for name, fault in faults.items() if not fault)
    passed = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    reason = f"the fastest for {capabilities.row_format} rows on {capabilities.device}"
    return best, "; ".join([reason, *passed])


def choose_attention(name: str | None, capabilities: Capabilities) -> tuple[type[Attention], str]:
    """`name_attention`, and the class instead of its name."""
    chosen, reason = name_attention(name, capabilities)
    return _load(chosen), reason


def make_attention(
    name: str | None,
    cache: CompressedKVCache | ExternalKVCache,
    num_heads: int,
    *,
    fixed: FixedShape | None = None,
    like: Attention | None = None,
) -> tuple[Attention, str]:
    """Choose as `choose_attention` does, and make it.

    Args:
        name (str | None): of `NAMES`; None takes the fastest that is possible.
        cache (CompressedKVCache): what is attended to.
        num_heads (int): query heads.
        fixed (FixedShape | None): the one shape of every step, for CUDA graphs; eager attention has no use for it.
        like (Attention | None): one of the same cache with a larger fixed shape, planned before. The two take turns, so the new
            one uses its buffers where the implementation can.

    Returns:
        tuple[Attention, str]: the attention, and the reason.
    """
    chosen, reason = choose_attention(name, find_capabilities(cache.device, cache.spec.row_format, num_heads))
    if chosen is EagerAttention:
        return EagerAttention(cache), reason
    workspace = getattr(like, "workspace", None)
    options = {} if workspace is None else {"workspace": workspace}
    return chosen(cache, num_heads, fixed=fixed, **options), reason  # type: ignore[call-arg]


def _load(name: str) -> type[Attention]:
    if name == "flashinfer":
        from sglang_dsv4.attention.flashinfer import FlashInferAttention

        return FlashInferAttention
    if name == "flashmla":
        from sglang_dsv4.attention.flashmla import FlashMLAAttention

        return FlashMLAAttention
    return EagerAttention
