"""Every fused operation once or twice on a small case, for a sanitizer: ``compute-sanitizer --tool memcheck python -m ...``."""

import torch

from tests.cache.driver import feed, make_spec, random_sequence
from tests.cache.test_gpu import make_cache


def main():
    """Fill a cache in chunks and decode steps, and choose entries."""
    spec = make_spec(("fp8_584", "fp8"), max_draft_tokens=1)
    sequences = [random_sequence(spec, 300, seed).to("cuda") for seed in range(2)]
    cache = make_cache(spec)
    requests = [cache.open() for _ in sequences]
    steps = [(5, 140), (130, 0), (1, 1), (2, 3), (126, 100)]
    for counts in steps:
        items = list(zip(requests, sequences, counts, strict=True))
        plan = feed(cache, items)
    plan = cache.plan([(request, 0) for request in requests])
    index_q = torch.randn(len(plan.step.positions), 16, 128, device="cuda")
    cache.layers[1].select(plan, index_q, torch.rand(len(index_q), 16, device="cuda"))
    torch.cuda.synchronize()
    print(f"{cache.kernels.name}: {[request.seq_len for request in requests]} tokens")


if __name__ == "__main__":
    main()
