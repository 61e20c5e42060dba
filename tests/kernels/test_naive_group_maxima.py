"""The largest of each group of scores, computed another way."""

import torch

from dsv4_kernels.group_maxima import naive_group_maxima


def test_matches_a_loop():
    scores = torch.randn(9, 48)
    visible = torch.tensor([48, 47, 41, 40, 39, 8, 1, 0, 17])
    found = torch.full((9, 6), 7.0)
    naive_group_maxima(scores, visible, 8, found)
    for row, count in enumerate(visible.tolist()):
        for group in range(6):
            seen = scores[row, 8 * group : min(8 * group + 8, count)]
            assert found[row, group] == (max(seen.tolist()) if len(seen) else 7.0)
    assert (found == 7.0).sum() == 0 + 0 + 0 + 1 + 1 + 5 + 5 + 6 + 3
