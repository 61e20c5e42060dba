"""Our pool without a server around it: what SGLang's scheduler would ask for, in its own words."""

from types import SimpleNamespace
from typing import Any

import torch

from sglang_dsv4.spec import CacheSpec


def model_config(max_seq_len: int, index_heads: int) -> Any:
    """SGLang's ModelConfig as far as our pool reads it."""
    return SimpleNamespace(context_len=max_seq_len, hf_config=SimpleNamespace(index_n_heads=index_heads))


def bare_pool(spec: CacheSpec, model: Any, num_pages: int, max_requests: int, device: str = "cpu", **changed: Any) -> Any:
    """A `CompressedTokenToKVPool` whose window pages are its history pages in reverse: SGLang's allocators number them apart.

    Args:
        spec (CacheSpec): the model's.
        model (Any): of `model_config`.
        num_pages (int): pages of either kind, beside page 0, where padding goes.
        max_requests (int): requests at once; slot 0 is one more, for padding.
        device (str): where the pool lives.
        changed (Any): arguments of SGLang's pool that are to differ.
    """
    from sglang_dsv4.plugin.install import versions
    from sglang_dsv4.plugin.serve.pool import pool_factory

    page, layers = spec.page_tokens, [layer.ratio for layer in spec.layers]
    tokens = num_pages * page
    native = {
        "max_num_reqs": max_requests,
        "num_req_slots": max_requests + 1,
        "swa_size": tokens,
        "c4_size": tokens // 4,
        "c128_size": tokens // 128,
        "c4_state_pool_size": 0,
        "c128_state_pool_size": 0,
        "page_size": page,
        "swa_page_size": page,
        "sliding_window": spec.window,
        "dtype": torch.float8_e4m3fn,
        "c4_state_dtype": torch.float32,
        "c128_state_dtype": torch.float32,
        "qk_nope_head_dim": 448,
        "qk_rope_head_dim": 64,
        "indexer_head_dim": spec.index_dim,
        "layer_num": len(layers),
        "device": device,
        "enable_memory_saver": False,
        "compression_ratios": layers,
    }
    versions.installed().begin_without_server()
    pool = pool_factory(spec, model)(**{**native, **changed})
    slots = torch.arange(tokens + page, device=device)
    pool.register_mapping(-(slots // page) % (num_pages + 1) * page + slots % page)
    return pool
