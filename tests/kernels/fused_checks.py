"""Checks of the fused kernels against the references, for Triton's CPU interpreter and for a GPU alike.

Run as a program it makes every check on the CPU and prints ``{check: "" or its fault}``: the interpreter is chosen when a
kernel is defined, so it needs a process of its own.
"""

import random

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT
from dsv4_kernels.flush_csa import CsaTuning
from dsv4_kernels.flush_hca import HcaTuning
from dsv4_kernels.hadamard import naive_hadamard
from dsv4_kernels.hadamard.fused import hadamard_rows
from dsv4_kernels.layout import INDEX_FORMATS, ROW_FORMATS
from dsv4_kernels.norm_rope.fused import tree_sum
from dsv4_kernels.row_codec import naive_store_rows
from dsv4_kernels.row_codec.fused import store_chunk, store_format
from tests.kernels.flush_world import HCA_RATIO, World, nan_pool, one_step, random_schedule
from tests.kernels.interpreting import make_checks

POOLS = ("csa_pool", "index_pool", "hca_pool")
# Relative error of a pooled fp32 value. A weight exp2((g - m) log2 e) is off by 2^-24 (1 + 2 |g - m|) from its argument and
# 2^-22 from the exponential; gates here differ by less than 30, and HCA rescales a sum 128 times, by 2^-22 each. The norm
# divides by a mean of such values. 2^-15 of the row's largest value is an upper bound of all that.
POOL_ERROR = 2.0**-15


@triton.jit
def store_kernel(
    p_pool, p_slot, p_x, FORMAT: tl.constexpr, E: tl.constexpr, C: tl.constexpr, D: tl.constexpr, CASTS: tl.constexpr
):
    """Store ``E`` rows chunk by chunk."""
    o_e = tl.program_id(0) * E + tl.arange(0, E)
    for c in tl.static_range(D // C):
        b_x = tl.load(p_x + o_e[:, None] * D + c * C + tl.arange(0, C)[None, :])
        store_chunk(p_pool, tl.load(p_slot + o_e), b_x, o_e >= 0, c * C, FORMAT, E, C, D, CASTS)


@triton.jit
def rotate_kernel(p_x, p_y, p_sum, E: tl.constexpr, D: tl.constexpr):
    """Rotate ``E`` rows, and sum them."""
    o_e = tl.arange(0, E)
    o_x = o_e[:, None] * D + tl.arange(0, D)[None, :]
    b_x = tl.load(p_x + o_x)
    tl.store(p_y + o_x, hadamard_rows(b_x, E, D, D**-0.5))
    tl.store(p_sum + o_e, tree_sum(b_x, E, D))


def hard_rows(dim, device, count=64):
    """Rows of every size, with ties, subnormals, zeros of both signs, and values at the formats' limits."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(count, dim, generator=generator) * torch.exp(4 * torch.randn(count, 1, generator=generator))
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2] = torch.arange(dim) * 2.0**-9  # e4m3's subnormals, and ties between its normal values
    rows[3] = torch.arange(dim) * 2.0**-10 - 0.01
    rows[4] = 448.0
    rows[5] = torch.linspace(-448, 448, dim)
    rows[6] = 1e-6
    rows[7] = torch.arange(dim).float() * 2.0**-7 + 1.0  # ties of bf16
    return rows.to(device)


def stored_bytes(fmt, rows, device, chunk, hardware_casts):
    """The pool after storing ``rows``, as bytes, by the kernel."""
    pool = nan_pool(fmt, len(rows), device)
    slots = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).to(device)
    store_kernel[(len(rows) // 4,)](pool, slots, rows, store_format(fmt), 4, chunk, fmt.dim, hardware_casts, **EXACT)
    return pool.view(torch.uint8), slots


def check_row_bytes(device="cpu", hardware_casts=False):
    """Every format, to the bit."""
    for fmt in (*ROW_FORMATS.values(), *INDEX_FORMATS.values()):
        rows = hard_rows(fmt.dim, device)
        for chunk in {128, fmt.dim}:
            found, slots = stored_bytes(fmt, rows, device, chunk, hardware_casts)
            expected = nan_pool(fmt, len(rows), device)
            naive_store_rows(expected, slots, rows, fmt)
            differing = (found != expected.view(torch.uint8)).sum().item()
            assert differing == 0, f"{fmt.name}-{fmt.dim}, {chunk}: {differing} bytes differ"


def check_hadamard_and_sum(device="cpu"):
    """The rotation, to the bit; the sum, within the rounding of its seven additions."""
    x = torch.randn(8, 128, device=device)
    rotated, total = torch.full_like(x, float("nan")), torch.full((8,), float("nan"), device=device)
    rotate_kernel[(1,)](x, rotated, total, 8, 128, **EXACT)
    assert torch.equal(rotated, naive_hadamard(x)), "rotation"
    assert ((total - x.double().sum(1)).abs() <= 7 * 2.0**-24 * x.abs().sum(1)).all(), "sum"


def schedule_state(world, schedule, *, pad=0, together=True, **tunings):
    """State after running a schedule by the kernels; steps get up to ``pad`` padding tokens and requests."""
    state = world.fresh_state()
    for number, items in enumerate(schedule):
        padding = number % (pad + 1)
        step, given = world.step(items, pad_tokens=padding, pad_requests=padding)
        world.run_fused(state, step, given, together=together, **tunings)
    return state


def same_bytes(first, second, names=POOLS):
    """Whether two states' pools are equal."""
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in names)


def faults_against_naive(world, schedule, *, wrong_bias=0.0):
    """Run a schedule by kernels and references; what differs by more than rounding, by name."""
    ours, theirs = world.fresh_state(), world.fresh_state()
    for number, items in enumerate(schedule):
        step, given = world.step(items, pad_tokens=number % 3, pad_requests=number % 2)
        world.run_fused(ours, step, given, together=number % 2 == 0)
        step, given = world.step(items)
        for name in ("main", "index", "hca"):
            given[name][..., -1] += wrong_bias  # one gate channel of every token
        world.run_naive(theirs, step, given)
    # The accumulator after a block's last token is not read again, and the kernel does not keep it.
    kept = theirs["accumulators"].clone()
    for sequence, length in enumerate(world.lengths):
        for position in range(max(0, length - kept.shape[1]), length):
            if position % HCA_RATIO == HCA_RATIO - 1:
                kept[world.slots[sequence], position % kept.shape[1]] = float("nan")
        if length % HCA_RATIO == 0 or length % HCA_RATIO < kept.shape[1]:
            kept[world.slots[sequence]] = float("nan")
    found = []
    for name, tensor in ours.items():
        expected = kept if name == "accumulators" else theirs[name]
        exact = name.endswith(("streams", "boundary"))
        if name == "accumulators":
            tensor = tensor.masked_fill(expected.isnan(), float("nan"))
        if not torch.equal(tensor.isnan(), expected.isnan()):
            found.append(f"{name}: other rows were written")
        bound = 0.0 if exact else POOL_ERROR * expected.nan_to_num().abs().amax(-1, keepdim=True)
        if ((tensor - expected).nan_to_num().abs() > bound).any():
            found.append(f"{name}: {(tensor - expected).nan_to_num().abs().max().item()}")
    return found


def small_world(device, formats, **options):
    """Three sequences that cross block, page and HCA boundaries."""
    return World([140, 37, 1], formats, seed=3, device=device, **options)


def check_values(device="cpu"):
    """Values and written rows against the references, and a wrong gate is seen."""
    for draft in (0, 3):
        world = small_world(device, "fp32", draft=draft)
        schedule = random_schedule(world.lengths, random.Random(draft), 60)
        found = faults_against_naive(world, schedule)
        assert not found, found
    world = World([20, 7], "fp32", seed=3, device=device)
    schedule = one_step(world.lengths)
    assert not faults_against_naive(world, schedule)
    found = faults_against_naive(world, schedule, wrong_bias=2.0**-7)
    assert len(found) >= 4, f"a wrong gate was not seen: {found}"


def check_chunking(device="cpu"):
    """P1: the same bytes for any schedule, padded or not, in one launch or in two."""
    world = small_world(device, "fp8", draft=1)
    whole = schedule_state(world, one_step(world.lengths))
    for seed, most in ((1, 90), (2, 30)):
        schedule = random_schedule(world.lengths, random.Random(seed), most)
        state = schedule_state(world, schedule, pad=2, together=seed == 1)
        assert same_bytes(state, whole), f"schedule {seed}"


def check_tunings(device="cpu"):
    """The same bytes however a launch is cut."""
    world = small_world(device, "fp8", draft=1)
    schedule = [[(0, 0, 70), (1, 0, 37)], [(0, 70, 1), (2, 0, 1)], [(0, 71, 69)]]
    whole = schedule_state(world, schedule)
    for csa, hca, together in (
        (CsaTuning(1, 128, 1, 1, {}), HcaTuning(16, 1, 16), True),
        (CsaTuning(2, 256, 2, 4, {}), HcaTuning(4, 1, 4), False),
        (CsaTuning(4, 512, 2, 8, {}), HcaTuning(8, 4, 2), True),
    ):
        state = schedule_state(world, schedule, together=together, csa=csa, hca=hca)
        assert same_bytes(state, whole, [*POOLS, "main_streams", "index_boundary"]), (csa, hca)


def check_ring_is_read_before_it_is_written(device="cpu"):
    """A step that closes a block from ring rows which its own survivors overwrite, at every start."""
    world = World([30], "fp32", seed=5, device=device)
    whole = schedule_state(world, one_step(world.lengths))
    for start in range(1, 9):
        interpreted = (12,) if start % 2 else (5,)  # both take long there
        for count in interpreted if device == "cpu" else (5, 12):
            state = schedule_state(world, [[(0, 0, start)], [(0, start, count)], [(0, start + count, 30 - start - count)]])
            assert same_bytes(state, whole), f"start {start}, {count} tokens"


CHECKS = {
    "row bytes": check_row_bytes,
    "hadamard and sum": check_hadamard_and_sum,
    "values": check_values,
    "chunking": check_chunking,
    "tunings": check_tunings,
    "ring": check_ring_is_read_before_it_is_written,
}


if __name__ == "__main__":
    make_checks(CHECKS)
