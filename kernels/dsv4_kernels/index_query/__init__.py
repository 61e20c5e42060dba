"""Rotate index queries and share out the scores. The reference is `dsv4_kernels.index_score.naive_index_query`."""
