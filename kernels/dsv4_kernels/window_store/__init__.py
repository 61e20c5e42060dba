"""Store the raw K=V rows of the window."""

from dsv4_kernels.window_store.naive import naive_window_store

__all__ = ["naive_window_store"]
