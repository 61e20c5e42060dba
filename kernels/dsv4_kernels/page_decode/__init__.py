"""Whole pages of a packed pool, decoded into dense bf16 rows."""

from dsv4_kernels.page_decode.naive import naive_page_decode, num_page_rows

__all__ = ["naive_page_decode", "num_page_rows"]
