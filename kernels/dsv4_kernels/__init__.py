"""Stateless operations on the compressed KV cache of DeepSeek-V4: torch and triton only.

Every operation is a folder ``<op>/``. ``naive.py`` is its reference in PyTorch: short, fp32 inside, and citing the
equation it computes. Equation numbers are those of the DeepSeek-V4 report (arXiv 2606.19348).
"""
