"""Encode vectors into stored rows and back."""

from dsv4_kernels.row_codec.naive import naive_load_rows, naive_quantize_e4m3, naive_store_rows

__all__ = ["naive_load_rows", "naive_quantize_e4m3", "naive_store_rows"]
