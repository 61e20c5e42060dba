"""Torch replacements for what SGLang's DeepSeek-V4 path has only as GPU kernels."""
