"""Indexer scores, and top-k with ties to the lowest index."""

import torch

from dsv4_kernels.index_score import naive_index_scores, naive_topk_entries


def test_scores_match_fp64():
    q, weights, keys = torch.randn(7, 16, 128), torch.randn(7, 16), torch.randn(30, 128)
    dots = torch.einsum("thd,sd->ths", q.double(), keys.double()).clamp_min(0)
    exact = (dots * weights.double().unsqueeze(1).transpose(1, 2)).sum(1)
    # 128 products and sums per dot, 16 per score; magnitudes bounded by the same sums of absolute values.
    bound = torch.einsum("thd,sd,th->ts", q.abs().double(), keys.abs().double(), weights.abs().double())
    bound = bound * (128 + 16) * 2.0**-24
    found = naive_index_scores(q, weights, keys)
    assert ((found - exact).abs() <= bound).all()
    without_relu = torch.einsum("thd,sd,th->ts", q.double(), keys.double(), weights.double())
    assert not ((found - without_relu).abs() <= bound).all()


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 5.0, 1.0, 5.0, 1.0, 0.0], [0.0] * 6, [2.0, 2.0, 9.0, 9.0, 9.0, 9.0]])
    chosen = naive_topk_entries(scores, torch.tensor([6, 5, 2]), 4)
    assert chosen.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_nothing_visible_and_fewer_than_k():
    scores = torch.full((2, 3), float("nan"))
    scores[1, 0] = -1.0
    assert naive_topk_entries(scores, torch.tensor([0, 1]), 5).tolist() == [[-1, -1, -1], [0, -1, -1]]


def test_matches_a_sort_by_score_and_index():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 40), generator=generator).float()
    visible = torch.randint(0, 41, (50,), generator=generator)
    chosen = naive_topk_entries(scores, visible, 9)
    for row, count, found in zip(scores.tolist(), visible.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(count), key=lambda s: (-row[s], s))[:9]
        assert found == sorted(best) + [-1] * (9 - len(best))
