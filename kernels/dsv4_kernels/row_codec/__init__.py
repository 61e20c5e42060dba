"""Encode vectors into stored rows and back, and move stored rows."""

from dsv4_kernels.row_codec.naive import (
    naive_load_rows,
    naive_put_row_bytes,
    naive_quantize_e4m3,
    naive_row_bytes,
    naive_store_rows,
)

__all__ = ["naive_load_rows", "naive_put_row_bytes", "naive_quantize_e4m3", "naive_row_bytes", "naive_store_rows"]
