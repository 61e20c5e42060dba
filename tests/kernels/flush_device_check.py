"""Long random checks of the flush on a GPU; run as a program, it prints one line per check."""

import random
import sys
import time

import torch

from tests.kernels.flush_world import FORMATS, World, one_step, random_schedule

POOLS = ("csa_pool", "index_pool", "hca_pool")


def run_schedule(world, schedule, *, pad=0, together=True):
    state = world.fresh_state()
    for number, items in enumerate(schedule):
        step, given = world.step(items, pad_tokens=number % (pad + 1), pad_requests=number % (pad + 1))
        world.run_fused(state, step, given, together=together)
    return state


def same_bytes(first, second, names=POOLS):
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in names)


def main():
    device = "cuda"
    pairs = [(formats, dtype) for formats in FORMATS for dtype in (torch.float32, torch.bfloat16)]
    for formats, dtype in pairs:
        if True:
            world = World([700, 37, 1, 300, 129, 128], formats, dtype, page_tokens=128, draft=2, seed=11, device=device)
            began, moved = time.time(), 0
            whole = run_schedule(world, one_step(world.lengths))
            again = run_schedule(world, one_step(world.lengths))
            count = int(sys.argv[1]) if len(sys.argv) > 1 else 25
            for seed in range(count):
                rng = random.Random(seed)
                schedule = random_schedule(world.lengths, rng, [300, 150, 40, 4][seed % 4])
                state = run_schedule(world, schedule, pad=seed % 3, together=seed % 2 == 0)
                moved += not same_bytes(state, whole)
            naive = world.fresh_state()
            step, given = world.step(one_step(world.lengths)[0])
            world.run_naive(naive, step, given)
            shares = {}
            for name in naive:
                x, y = whole[name], naive[name]
                if name == "accumulators":
                    both = ~(x.isnan() | y.isnan())
                    shares[name] = (x[both] - y[both]).abs().max().item()
                    continue
                shares[name] = (x.view(torch.uint8) != y.view(torch.uint8)).float().mean().item()
            print(
                formats, dtype, "schedules", count, "differ", moved, "repeat", same_bytes(whole, again),
                {k: float(f"{v:.3g}") for k, v in shares.items()}, f"{time.time() - began:.1f}s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
