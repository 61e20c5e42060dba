"""The largest of each eight scores, for scores that another kernel wrote; the fused form is in ``fused``."""

from dsv4_kernels.group_maxima.naive import naive_group_maxima

__all__ = ["naive_group_maxima"]
