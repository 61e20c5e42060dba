"""Encoding and decoding of rows inside a kernel: what `naive_store_rows` and `naive_load_rows` do, to the bit."""

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from dsv4_kernels.layout import FP8_584_ROW, FP8_INDEX, FP8_TILE, NOPE_DIM, RowFormat


@dataclass(frozen=True)
class StoreFormat:
    """A `RowFormat` as a compile-time constant of a kernel."""

    kind: str
    data_bytes: int
    scale_bytes: int
    scale_offset: int
    group_rows: int
    group_bytes: int
    nope_dim: int
    tile: int


@cache
def store_format(fmt: RowFormat) -> StoreFormat:
    """Constants of ``fmt``; ``kind`` is "plain" where a row is its values in the pool's own type."""
    packed = {FP8_584_ROW: "packed_row", FP8_INDEX: "packed_index"}
    return StoreFormat(
        kind=packed.get(fmt, "plain"),
        data_bytes=fmt.data_bytes,
        scale_bytes=fmt.scale_bytes,
        scale_offset=fmt.scale_offset,
        group_rows=fmt.group_rows,
        group_bytes=fmt.group_bytes,
        nope_dim=NOPE_DIM,
        tile=FP8_TILE if fmt is FP8_584_ROW else fmt.dim,
    )


@triton.jit
def round_to_e4m3(b_x, HARDWARE_CASTS: tl.constexpr):
    """e4m3 bytes of values in -448 .. 448 and of NaN, to nearest, ties to even."""
    if HARDWARE_CASTS:
        return b_x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_abs = b_bits & 0x7FFFFFFF
    # From 2^-6 up: three mantissa bits, exponent bias 7 in place of 127.
    b_normal = ((b_abs + 0x7FFFF + ((b_abs >> 20) & 1)) >> 20) - (120 << 3)
    b_normal = tl.minimum(b_normal, 0x7F)  # NaN; 448 is 0x7E
    # Below: multiples of 2^-9. Adding 2^14, whose last bit is worth 2^-9, rounds to one.
    b_small = (b_abs.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    b_byte = tl.where(b_abs < 0x3C800000, b_small, b_normal) | ((b_bits >> 24) & 0x80)
    return b_byte.to(tl.uint8)


@triton.jit
def round_to_bf16(b_x, HARDWARE_CASTS: tl.constexpr):
    """bf16 values, to nearest, ties to even."""
    if HARDWARE_CASTS:
        return b_x.to(tl.bfloat16)
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
    b_bits = tl.where(b_x != b_x, 0x7FC0, b_bits)  # the carry of a NaN's last bits would make it a number
    return b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def quantize_e4m3(b_x, HARDWARE_CASTS: tl.constexpr):
    """Quantise each tile of ``[E, tiles, tile]`` with one power-of-two scale: bytes, and exponents ``[E, tiles]``.

    An infinite channel gives the exponent 128, so that the tile's scale is NaN or infinite; a maximum passes over NaN, which
    keeps its own byte, since clamping does not.
    """
    b_amax = tl.maximum(tl.max(tl.abs(b_x), axis=2), 1e-4)
    b_bits = (b_amax * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    b_exponent = (b_bits >> 23) - 127 + ((b_bits & 0x7FFFFF) != 0).to(tl.int32)  # ceil(log2)
    b_inverse = ((127 - b_exponent) << 23).to(tl.float32, bitcast=True)
    b_scaled = b_x * b_inverse[:, :, None]  # [E, tiles, tile]
    b_scaled = tl.maximum(b_scaled, -448.0, propagate_nan=tl.PropagateNan.ALL)
    b_scaled = tl.minimum(b_scaled, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return round_to_e4m3(b_scaled, HARDWARE_CASTS), b_exponent


@triton.jit
def store_chunk(
    p_pool,
    b_slot,
    b_x,
    m_e,
    FIRST: tl.constexpr,
    FORMAT: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Write channels ``FIRST .. FIRST+C-1`` of rows, ``[E, C]`` fp32, at rows ``b_slot`` ``[E]`` (int64), where ``m_e``."""
    o_d = (FIRST + tl.arange(0, C))[None, :]
    m_e = m_e[:, None]
    b_slot = b_slot[:, None]  # [E, 1]
    if FORMAT.kind == "plain":
        if p_pool.dtype.element_ty == tl.float32:
            tl.store(p_pool + b_slot * D + o_d, b_x, mask=m_e)
        else:
            tl.store(p_pool + b_slot * D + o_d, round_to_bf16(b_x, CASTS), mask=m_e)
    else:
        TILES: tl.constexpr = C // FORMAT.tile
        p_group = p_pool + (b_slot // FORMAT.group_rows) * FORMAT.group_bytes  # [E, 1]
        p_data = p_group + (b_slot % FORMAT.group_rows) * FORMAT.data_bytes
        p_scale = p_group + FORMAT.scale_offset + (b_slot % FORMAT.group_rows) * FORMAT.scale_bytes
        b_bytes, b_exponent = quantize_e4m3(tl.reshape(b_x, [E, TILES, FORMAT.tile]), CASTS)
        b_bytes = tl.reshape(b_bytes, [E, C])
        o_t = (FIRST // FORMAT.tile + tl.arange(0, TILES))[None, :]
        if FORMAT.kind == "packed_index":
            tl.store(p_data + o_d, b_bytes, mask=m_e)
            p_scale = (p_scale + o_t).to(tl.pointer_type(tl.float32))  # TILES is 1
            tl.store(p_scale, ((b_exponent + 127) << 23).to(tl.float32, bitcast=True), mask=m_e)
        else:
            tl.store(p_data + o_d, b_bytes, mask=(o_d < FORMAT.nope_dim) & m_e)
            if FORMAT.nope_dim < FIRST + C:
                p_rope = (p_data + FORMAT.nope_dim).to(tl.pointer_type(tl.bfloat16))
                m_rope = (o_d >= FORMAT.nope_dim) & m_e
                tl.store(p_rope + (o_d - FORMAT.nope_dim), round_to_bf16(b_x, CASTS), mask=m_rope)
            # The last tile is the RoPE part; its byte is the record's padding.
            b_scale = tl.where(o_t * FORMAT.tile < FORMAT.nope_dim, b_exponent + 127, 0)
            tl.store(p_scale + o_t, b_scale.to(tl.uint8), mask=m_e)


@triton.jit
def e4m3_to_fp32(b_byte, HARDWARE_CASTS: tl.constexpr):
    """Values of e4m3 bytes."""
    if HARDWARE_CASTS:
        return b_byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    b_bits = b_byte.to(tl.uint32)
    # Exponent and mantissa at their fp32 places, the bias put right by a product, which is exact, subnormals included.
    b_abs = ((b_bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    b_abs = tl.where((b_bits & 0x7F) == 0x7F, float("nan"), b_abs)
    return tl.where((b_bits & 0x80) != 0, -b_abs, b_abs)


@triton.jit
def decode_rows(p_pool, b_slot, m_r, p_row, FORMAT: tl.constexpr, D: tl.constexpr, CASTS: tl.constexpr):
    """Decode packed rows ``b_slot`` ``[R]`` (int64), where ``m_r``, to bf16 rows at ``p_row`` ``[R]``."""
    p_group = p_pool + (b_slot // FORMAT.group_rows) * FORMAT.group_bytes  # [R]
    p_data = p_group + (b_slot % FORMAT.group_rows) * FORMAT.data_bytes
    p_scale = p_group + FORMAT.scale_offset + (b_slot % FORMAT.group_rows) * FORMAT.scale_bytes
    TILES: tl.constexpr = D // FORMAT.tile
    o_i = tl.arange(0, TILES)
    o_x = o_i[:, None] * FORMAT.tile + tl.arange(0, FORMAT.tile)[None, :]  # [TILES, tile]
    m_nope = m_r[:, None] & (o_i * FORMAT.tile < FORMAT.nope_dim)[None, :]  # [R, TILES]
    ROPE: tl.constexpr = D - FORMAT.nope_dim
    o_r = tl.arange(0, ROPE)[None, :]
    # The pool's pointer is cast, not the rows': Triton 3.7 fails to compile a cast of 16 pointers.
    b_rope_at = (b_slot // FORMAT.group_rows) * (FORMAT.group_bytes // 2)  # in bf16 values
    b_rope_at += (b_slot % FORMAT.group_rows) * (FORMAT.data_bytes // 2) + FORMAT.nope_dim // 2
    p_rope = p_pool.to(tl.pointer_type(tl.bfloat16)) + b_rope_at
    b_byte = tl.load(p_data[:, None, None] + o_x[None, :, :], mask=m_nope[:, :, None], other=0)
    b_exponent = tl.load(p_scale[:, None] + o_i[None, :], mask=m_nope, other=127)
    b_rope = tl.load(p_rope[:, None] + o_r, mask=m_r[:, None], other=0.0)
    b_factor = (b_exponent.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    b_x = e4m3_to_fp32(b_byte, CASTS) * b_factor[:, :, None]  # [R, TILES, tile]
    p_x = p_row[:, None, None] + o_x[None, :, :]
    tl.store(p_x, round_to_bf16(b_x, CASTS), mask=m_nope[:, :, None])
    tl.store(p_row[:, None] + FORMAT.nope_dim + o_r, b_rope, mask=m_r[:, None])
