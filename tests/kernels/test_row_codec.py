"""Row formats: bytes where layout.py says, values as an independent quantiser gives them, and the kernels to the bit."""

import math

import pytest
import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT
from dsv4_kernels.layout import BF16_INDEX, BF16_ROW, FP8_584_ROW, FP8_INDEX, FP32_INDEX, FP32_ROW, INDEX_FORMATS, ROW_FORMATS
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.row_codec.fused import store_chunk, store_format
from tests.kernels.flush_world import nan_pool
from tests.kernels.interpreting import interpreted_checks

ROUNDING = [BF16_ROW, FP8_584_ROW, BF16_INDEX, FP8_INDEX]
ALL = [*ROUNDING, FP32_ROW, FP32_INDEX]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def make_pool(fmt, rows=150):
    """A pool of 0xFF bytes: NaN in every format."""
    shape = fmt.pool_shape(rows)
    pool = torch.full((shape[0], shape[1] * fmt.storage_dtype.itemsize), 0xFF, dtype=torch.uint8)
    return pool.view(fmt.storage_dtype)


def rows_like(fmt, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(4 * torch.randn(count, 1, generator=generator))
    return torch.randn(count, fmt.dim, generator=generator) * scale


def nearest_e4m3(x):
    """e4m3 byte of x by search over all 256 values; ties to the even byte, and the sign of zero kept."""
    distance = (E4M3 - x).abs().nan_to_num(nan=math.inf)
    best = distance.min()
    candidates = torch.nonzero(distance == best).flatten().tolist()
    candidates = [b for b in candidates if (b >= 0x80) == (math.copysign(1, x) < 0)]
    even = [b for b in candidates if b % 2 == 0]
    return (even or candidates)[0]


def test_byte_numbers():
    assert (FP8_584_ROW.row_bytes, FP8_584_ROW.group_bytes) == (584, 37440)
    assert (FP8_INDEX.row_bytes, FP8_INDEX.group_bytes) == (132, 8448)
    assert (BF16_ROW.row_bytes, BF16_INDEX.row_bytes) == (1024, 256)


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: f"{fmt.name}-{fmt.dim}")
def test_what_was_read_is_stored_again_unchanged_and_nothing_else_is_touched(fmt):
    pool, slots = make_pool(fmt), torch.tensor([149, 0, 63, 64, 3])
    naive_store_rows(pool, slots, rows_like(fmt, 5), fmt)
    read = naive_load_rows(pool, slots, fmt)
    assert torch.isfinite(read).all()
    again = make_pool(fmt)
    naive_store_rows(again, slots, read, fmt)
    assert torch.equal(naive_load_rows(again, slots, fmt), read)
    others = torch.tensor([i for i in range(150) if i not in slots.tolist()])
    assert naive_load_rows(pool, others, fmt).isnan().all()


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: f"{fmt.name}-{fmt.dim}")
def test_no_rows(fmt):
    pool = make_pool(fmt)
    naive_store_rows(pool, torch.zeros(0, dtype=torch.int64), torch.zeros(0, fmt.dim), fmt)
    assert naive_load_rows(pool, torch.zeros(0, dtype=torch.int64), fmt).shape == (0, fmt.dim)


def expected_scale(tile):
    return 2.0 ** math.ceil(math.log2(max(tile.abs().max().item(), 1e-4) / 448))


@pytest.mark.parametrize("slot", [0, 63, 64, 130])
def test_bytes_of_an_fp8_584_row(slot):
    row = rows_like(FP8_584_ROW, 1, seed=slot)[0]
    row[64:128] = 0.0  # amax at its floor
    row[128] = 448.0 * 4  # a scale that is an exact power of two
    row[129:192] = row[129:192].clamp(-1, 1)
    pool = make_pool(FP8_584_ROW)
    naive_store_rows(pool, torch.tensor([slot]), row.unsqueeze(0), FP8_584_ROW)
    group, index = divmod(slot, 64)
    data = pool[group, index * 576 : index * 576 + 576]
    scales = pool[group, 64 * 576 + index * 8 : 64 * 576 + index * 8 + 8]
    for tile in range(7):
        values = row[64 * tile : 64 * tile + 64]
        scale = expected_scale(values)
        assert scales[tile] == math.log2(scale) + 127
        assert data[64 * tile : 64 * tile + 64].tolist() == [nearest_e4m3(v) for v in (values / scale).tolist()]
    assert scales[7] == 0
    assert data[448:].tolist() == row[448:].to(torch.bfloat16).view(torch.uint8).tolist()


@pytest.mark.parametrize("slot", [0, 63, 64])
def test_bytes_of_an_fp8_index_key(slot):
    key = rows_like(FP8_INDEX, 1, seed=slot)[0]
    pool = make_pool(FP8_INDEX)
    naive_store_rows(pool, torch.tensor([slot]), key.unsqueeze(0), FP8_INDEX)
    group, index = divmod(slot, 64)
    scale = expected_scale(key)
    assert pool[group, 64 * 128 + index * 4 : 64 * 128 + index * 4 + 4].view(torch.float32).item() == scale
    data = pool[group, index * 128 : index * 128 + 128]
    assert data.tolist() == [nearest_e4m3(v) for v in (key / scale).tolist()]


@pytest.mark.parametrize("fmt", ROUNDING, ids=lambda fmt: f"{fmt.name}-{fmt.dim}")
def test_rounding_is_unbiased(fmt):
    """Mean relative error of n roundings of at most r each, uniform, stays within 5 sigma = 5 r / sqrt(3 n) of 0."""
    rows = torch.rand(150, fmt.dim, generator=torch.Generator().manual_seed(1)) + 1.0
    pool, slots = make_pool(fmt), torch.arange(150)
    naive_store_rows(pool, slots, rows, fmt)
    error = (naive_load_rows(pool, slots, fmt) - rows) / rows
    step = 2.0**-4 if fmt.scale_bytes else 2.0**-8

    def bound(step):
        return 5 * step / math.sqrt(3 * rows.numel())

    assert abs(error.mean().item()) <= bound(step)
    truncated = -rows.frac() % step  # what rounding down would give, the twin that must fail
    assert truncated.mean().item() > bound(step)


@pytest.mark.parametrize("fmt", [FP32_ROW, FP32_INDEX], ids=lambda fmt: f"{fmt.name}-{fmt.dim}")
def test_fp32_rows_are_exact(fmt):
    pool, slots, rows = make_pool(fmt), torch.tensor([3, 149]), rows_like(fmt, 2)
    naive_store_rows(pool, slots, rows, fmt)
    assert torch.equal(naive_load_rows(pool, slots, fmt), rows)


# NaN as CUDA makes it, and others: all bits of a mantissa set, and the sign.
NAN_BITS = (0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1)


def unfinished_rows(fmt, device="cpu"):
    """Rows with one channel that is no finite number, at the ends and within, beside finite rows; which are which."""
    values = torch.tensor([*NAN_BITS, 0x7F800000, 0x7F800000 - 2**31], dtype=torch.int32).view(torch.float32)
    channels = [channel for channel in (0, 63, 100, 447, 448, 511) if channel < fmt.dim]
    rows = rows_like(fmt, 2 * len(values) * len(channels))
    for number in range(len(values) * len(channels)):
        rows[2 * number, channels[number % len(channels)]] = values[number // len(channels)]
    rows[0] = rows[0].masked_fill(rows[0].isfinite(), 0.0)
    return rows.to(device), ~rows.isfinite().to(device)


def noticed_faults(store, fmt, device="cpu"):
    """What a store hides: rows that were no numbers and are, finite rows and tiles that are not, by number."""
    rows, bad = unfinished_rows(fmt, device)
    pool, slots = nan_pool(fmt, len(rows), device), torch.arange(len(rows), device=device)
    store(pool, slots, rows, fmt)
    read = naive_load_rows(pool, slots, fmt)
    lost = bad.any(1) & read.isfinite().all(1)
    tile = {FP8_584_ROW: 64, FP8_INDEX: 128}.get(fmt, 1)
    allowed = bad.unflatten(1, (-1, tile)).any(2).repeat_interleave(tile, 1)
    spread = (~read.isfinite() & ~allowed).any(1)
    return torch.nonzero(lost).flatten().tolist(), torch.nonzero(spread).flatten().tolist()


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: f"{fmt.name}-{fmt.dim}")
def test_what_is_no_number_is_stored_as_none(fmt):
    """Whatever the format, or integrity would pass over it: NaN stays, an infinite channel makes its tile's scale NaN."""
    assert noticed_faults(naive_store_rows, fmt) == ([], [])
    assert noticed_faults(lambda pool, slots, rows, fmt: naive_store_rows(pool, slots, rows.nan_to_num(), fmt), fmt)[0]


@triton.jit
def store_kernel(
    p_pool, p_slot, p_x, FORMAT: tl.constexpr, E: tl.constexpr, C: tl.constexpr, D: tl.constexpr, CASTS: tl.constexpr
):
    """Store ``E`` rows chunk by chunk."""
    o_e = tl.program_id(0) * E + tl.arange(0, E)
    for c in tl.static_range(D // C):
        b_x = tl.load(p_x + o_e[:, None] * D + c * C + tl.arange(0, C)[None, :])
        store_chunk(p_pool, tl.load(p_slot + o_e), b_x, o_e >= 0, c * C, FORMAT, E, C, D, CASTS)


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


def check_small(device="cpu", hardware_casts=False, count=16):
    """Every format, to the bit, in one chunk and in several."""
    for fmt in (*ROW_FORMATS.values(), *INDEX_FORMATS.values()):
        rows = hard_rows(fmt.dim, device, count)
        for chunk in {128, fmt.dim}:
            found, slots = stored_bytes(fmt, rows, device, chunk, hardware_casts)
            expected = nan_pool(fmt, len(rows), device)
            naive_store_rows(expected, slots, rows, fmt)
            differing = (found != expected.view(torch.uint8)).sum().item()
            assert differing == 0, f"{fmt.name}-{fmt.dim}, {chunk}: {differing} bytes differ"


def check_unfinished_rows(device="cpu", hardware_casts=False):
    """What is no number is none in the pool."""
    for fmt in ALL:
        for chunk in {128, fmt.dim}:

            def store(pool, slots, rows, fmt, chunk=chunk):
                store_kernel[(len(rows) // 4,)](
                    pool, slots, rows, store_format(fmt), 4, chunk, fmt.dim, hardware_casts, **EXACT
                )

            assert noticed_faults(store, fmt, device) == ([], []), (fmt.name, fmt.dim, chunk)


def check_more_rows(device="cpu"):
    """Rows of every size."""
    check_small(device, count=64)


@pytest.mark.gpu
def test_hardware_casts_store_the_same_bytes():
    if torch.cuda.get_device_capability() < (8, 9):
        return  # there are none: integer arithmetic is what `test_on_a_gpu` checks
    check_small("cuda", hardware_casts=True, count=64)
    check_unfinished_rows("cuda", hardware_casts=True)


SMALL = (check_small, check_unfinished_rows)
CHECKS = (check_more_rows,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")
