"""Hadamard rotation of index queries and index keys."""

from dsv4_kernels.hadamard.naive import naive_hadamard

__all__ = ["naive_hadamard"]
