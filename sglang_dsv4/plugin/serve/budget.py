"""How many tokens fit into the memory that SGLang gives to its cache: by the bytes that ours really allocates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dsv4.cache import Capacity
from sglang_dsv4.cache.regions import Owner, RegionTable, history_bytes_per_token
from sglang_dsv4.cache.sizing import NOWHERE, bytes_by_pool, most_pages, serving_capacity
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec


@dataclass(frozen=True)
class PoolShape:
    """What decides how large a pool is.

    Attributes:
        spec (CacheSpec): the model's cache.
        max_seq_len (int): tokens of the longest sequence that SGLang accepts.
        state_slots (int): requests, and one that pads batches.
        index_heads (int): heads of the indexer.
        on_gpu (bool): Triton kernels fill the cache, with scratch of their own.
    """

    spec: CacheSpec
    max_seq_len: int
    state_slots: int
    index_heads: int
    on_gpu: bool

    def capacity(self, history_tokens: int, window_tokens: int) -> Capacity:
        """A cache for so many tokens of either kind; SGLang sends padding to one more page, the first."""
        return serving_capacity(self.spec.page_tokens, history_tokens, window_tokens, self.state_slots, self.max_seq_len)

    def nbytes(self, history_tokens: int, window_tokens: int) -> int:
        """Bytes that a cache for so many tokens allocates."""
        capacity = self.capacity(history_tokens, window_tokens)
        pools = bytes_by_pool(self.spec, capacity)
        scratch = 0
        if self.on_gpu:
            from sglang_dsv4.cache.triton_kernels import TritonKernels

            scratch = TritonKernels(self.spec, capacity, NOWHERE, self.index_heads).nbytes
        return sum(pools.values()) + scratch

    def most_tokens(self, available_bytes: int, window_tokens: Callable[[int], int]) -> int:
        """The most tokens, in whole pages, of which a cache fits into so many bytes.

        Args:
            available_bytes (int): bytes for all of the cache.
            window_tokens (Callable[[int], int]): tokens in window pages, by tokens in history pages.

        Raises:
            UnsupportedError: not one page fits.
        """
        page_tokens = self.spec.page_tokens

        def nbytes(pages: int) -> int:
            tokens = pages * page_tokens
            return self.nbytes(tokens, window_tokens(tokens))

        pages = most_pages(nbytes, available_bytes)
        if pages == 0:
            raise UnsupportedError(
                f"memory for the cache: expected at least {nbytes(1)} bytes, of which requests take "
                f"{self.state_slots * RegionTable(self.spec).bytes_of(Owner.STATE_SLOT)}, got {available_bytes}; raise "
                "--mem-fraction-static or lower --max-running-requests"
            )
        return pages * page_tokens


def bytes_per_token(spec: CacheSpec, window_ratio: float) -> float:
    """Bytes that one more token takes, where ``window_ratio`` tokens of window pages come with it."""
    window = window_ratio * RegionTable(spec).bytes_of(Owner.WINDOW_PAGE) / spec.page_tokens
    return history_bytes_per_token(spec) + window


def shape_of(spec: CacheSpec, model_config: Any, state_slots: int, device: str) -> PoolShape:
    """The shape of a pool that SGLang is about to make.

    Args:
        spec (CacheSpec): of the model.
        model_config (Any): SGLang's ModelConfig.
        state_slots (int): requests, and one that pads batches.
        device (str): where the pool will be.
    """
    heads = model_config.hf_config.index_n_heads
    return PoolShape(spec, model_config.context_len, state_slots, heads, on_gpu=torch.device(device).type == "cuda")
