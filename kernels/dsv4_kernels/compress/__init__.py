"""Pooling of closed blocks."""

from dsv4_kernels.compress.naive import naive_csa_pool, naive_hca_finish, naive_hca_pool, naive_hca_start, naive_hca_update

__all__ = ["naive_csa_pool", "naive_hca_finish", "naive_hca_pool", "naive_hca_start", "naive_hca_update"]
