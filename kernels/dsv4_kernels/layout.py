"""Row formats: every byte number of the cache is defined here and nowhere else.

A *row* is one stored vector: a window row or an entry (512 values), or an index key (128 values). Formats that carry
scales are stored in *groups* of 64 rows: first the data of the 64 rows, then their scales, then padding. FlashMLA's and
SM120's packed kernels read exactly this arrangement, and the group is independent of the compression ratio, so a pool
of HCA entries is padded as little as a pool of CSA entries (below 0.2 %).
"""

from dataclasses import dataclass

import torch

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
INDEX_DIM = 128

FP8_MAX = 448.0
FP8_AMAX_FLOOR = 1e-4
FP8_TILE = 64
UE8M0_BIAS = 127


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RowFormat:
    """How one kind of row is stored.

    Attributes:
        name (str): the name users give.
        dim (int): values per row.
        storage_dtype (torch.dtype): element type of the pool tensor.
        data_bytes (int): bytes of values per row.
        scale_bytes (int): bytes of scales per row, padding of the scale record included.
        group_rows (int): rows that share one storage group; 1 when a row has no scales.
        group_align (int): a group's size in bytes is rounded up to a multiple of this.
    """

    name: str
    dim: int
    storage_dtype: torch.dtype
    data_bytes: int
    scale_bytes: int
    group_rows: int
    group_align: int

    @property
    def row_bytes(self) -> int:
        """Bytes one row needs, without the padding of its group."""
        return self.data_bytes + self.scale_bytes

    @property
    def scale_offset(self) -> int:
        """Byte offset of the scale records inside a group."""
        return self.group_rows * self.data_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes from one group to the next."""
        return _round_up(self.group_rows * self.row_bytes, self.group_align)

    def pool_shape(self, num_rows: int) -> tuple[int, int]:
        """Shape of the pool tensor that holds ``num_rows`` rows, in elements of ``storage_dtype``."""
        num_groups = -(-num_rows // self.group_rows)
        return num_groups, self.group_bytes // self.storage_dtype.itemsize

    def pool_bytes(self, num_rows: int) -> int:
        """Bytes of the pool tensor that holds ``num_rows`` rows."""
        num_groups, elements = self.pool_shape(num_rows)
        return num_groups * elements * self.storage_dtype.itemsize


BF16_ROW = RowFormat("bf16", HEAD_DIM, torch.bfloat16, HEAD_DIM * 2, 0, 1, 1)
# 448 e4m3 values, 64 bf16 values, then 7 UE8M0 scales (one per 64 values) and one pad byte: 584 bytes.
FP8_584_ROW = RowFormat("fp8_584", HEAD_DIM, torch.uint8, NOPE_DIM + 2 * ROPE_DIM, 8, 64, 576)
# Exact rows: nothing is rounded when it is stored. For debugging and comparison, not for serving.
FP32_ROW = RowFormat("fp32", HEAD_DIM, torch.float32, HEAD_DIM * 4, 0, 1, 1)
BF16_INDEX = RowFormat("bf16", INDEX_DIM, torch.bfloat16, INDEX_DIM * 2, 0, 1, 1)
# 128 e4m3 values and one fp32 scale (always a power of two): 132 bytes.
FP8_INDEX = RowFormat("fp8", INDEX_DIM, torch.uint8, INDEX_DIM, 4, 64, 1)

FP32_INDEX = RowFormat("fp32", INDEX_DIM, torch.float32, INDEX_DIM * 4, 0, 1, 1)

ROW_FORMATS = {fmt.name: fmt for fmt in (BF16_ROW, FP8_584_ROW, FP32_ROW)}
INDEX_FORMATS = {fmt.name: fmt for fmt in (BF16_INDEX, FP8_INDEX, FP32_INDEX)}
