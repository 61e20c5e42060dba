"""Schedule of a persistent attention kernel over lists of rows."""

from dsv4_kernels.mla_schedule.naive import naive_mla_schedule
from dsv4_kernels.mla_schedule.work import TILE_KEYS, WorkLists, max_works

__all__ = ["TILE_KEYS", "WorkLists", "max_works", "naive_mla_schedule"]
