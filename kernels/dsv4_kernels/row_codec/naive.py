"""Reference row codecs."""

import math

import torch

from dsv4_kernels.layout import FP8_584_ROW, FP8_AMAX_FLOOR, FP8_INDEX, FP8_MAX, FP8_TILE, NOPE_DIM, UE8M0_BIAS, RowFormat


def naive_quantize_e4m3(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each tile to e4m3 with one power-of-two scale.

    Equation:
        s = 2^ceil(log2(max(amax, 1e-4) / 448));  q = e4m3(clamp(x / s, -448, 448)), ties to even      [QUANT-FP8]
        Source: the released checkpoint's act_quant with scale format ue8m0.

    What is no number stays none: NaN is stored as NaN, and an infinite channel makes its tile's scale 2^128, whose ue8m0
    byte 0xFF is NaN and whose fp32 value is infinite.

    Args:
        tiles (torch.Tensor): ``[..., tile]``, fp32.

    Returns:
        tuple: values ``[..., tile]`` float8_e4m3fn, and exponents ``[...]`` int32 (``s = 2**exponent``).
    """
    amax = tiles.abs().nan_to_num(0.0, math.inf).amax(dim=-1).clamp_min(FP8_AMAX_FLOOR)  # [...]
    mantissa, exponent = torch.frexp(amax * (1.0 / FP8_MAX))  # value = mantissa * 2**exponent, 0.5 <= mantissa < 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = exponent.masked_fill(amax.isinf(), UE8M0_BIAS + 1)
    scaled = torch.ldexp(tiles, -exponent.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), exponent


def _store_grouped(pool: torch.Tensor, slots: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, fmt: RowFormat) -> None:
    group, row = slots // fmt.group_rows, slots % fmt.group_rows
    data_cols = (row * fmt.data_bytes).unsqueeze(1) + torch.arange(fmt.data_bytes, device=pool.device)
    scale_cols = (fmt.scale_offset + row * fmt.scale_bytes).unsqueeze(1) + torch.arange(fmt.scale_bytes, device=pool.device)
    pool[group.unsqueeze(1), data_cols] = data
    pool[group.unsqueeze(1), scale_cols] = scales


def _load_grouped(pool: torch.Tensor, slots: torch.Tensor, fmt: RowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    group, row = slots // fmt.group_rows, slots % fmt.group_rows
    data_cols = (row * fmt.data_bytes).unsqueeze(1) + torch.arange(fmt.data_bytes, device=pool.device)
    scale_cols = (fmt.scale_offset + row * fmt.scale_bytes).unsqueeze(1) + torch.arange(fmt.scale_bytes, device=pool.device)
    return pool[group.unsqueeze(1), data_cols], pool[group.unsqueeze(1), scale_cols]


def naive_store_rows(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, fmt: RowFormat) -> None:
    """Write ``rows`` at ``slots`` of ``pool``.

    Args:
        pool (torch.Tensor): ``fmt.pool_shape(num_rows)``, ``fmt.storage_dtype``. Written.
        slots (torch.Tensor): ``[N]`` int64, distinct row numbers.
        rows (torch.Tensor): ``[N, fmt.dim]``, fp32. Rounded once, to nearest even.
        fmt (RowFormat): the pool's format.
    """
    if fmt.group_rows == 1:
        pool[slots] = rows.to(fmt.storage_dtype)
        return
    if fmt is FP8_584_ROW:
        nope, rope = rows[:, :NOPE_DIM], rows[:, NOPE_DIM:]
        values, exponents = naive_quantize_e4m3(nope.unflatten(1, (-1, FP8_TILE)))  # [N, 7, 64], [N, 7]
        data = torch.cat(
            [values.view(torch.uint8).flatten(1), rope.to(torch.bfloat16).contiguous().view(torch.uint8)], dim=1
        )  # [N, 576]
        scales = torch.zeros(len(rows), fmt.scale_bytes, dtype=torch.uint8, device=rows.device)
        scales[:, : exponents.shape[1]] = (exponents + UE8M0_BIAS).to(torch.uint8)
    else:
        assert fmt is FP8_INDEX, fmt.name
        values, exponents = naive_quantize_e4m3(rows)  # [N, 128], [N]
        data = values.view(torch.uint8)
        scale = torch.ldexp(torch.ones_like(rows[:, 0]), exponents)
        scales = scale.unsqueeze(1).view(torch.uint8)  # [N, 4]
    _store_grouped(pool, slots, data, scales, fmt)


def naive_load_rows(pool: torch.Tensor, slots: torch.Tensor, fmt: RowFormat) -> torch.Tensor:
    """Read rows back as fp32; exact, since every stored value is an fp32 number.

    Args:
        pool (torch.Tensor): as in `naive_store_rows`.
        slots (torch.Tensor): ``[N]`` int64 row numbers, each inside the pool.
        fmt (RowFormat): the pool's format.

    Returns:
        torch.Tensor: ``[N, fmt.dim]``, fp32.
    """
    if fmt.group_rows == 1:
        return pool[slots].float()
    data, scales = _load_grouped(pool, slots, fmt)
    if fmt is FP8_584_ROW:
        values = data[:, :NOPE_DIM].view(torch.float8_e4m3fn).float().unflatten(1, (-1, FP8_TILE))  # [N, 7, 64]
        exponents = scales[:, : values.shape[1]].int() - UE8M0_BIAS
        nope = torch.ldexp(values, exponents.unsqueeze(-1)).flatten(1)
        rope = data[:, NOPE_DIM:].contiguous().view(torch.bfloat16).float()
        return torch.cat([nope, rope], dim=1)
    assert fmt is FP8_INDEX, fmt.name
    scale = scales.contiguous().view(torch.float32)  # [N, 1]
    return data.view(torch.float8_e4m3fn).float() * scale


def naive_row_bytes(pool: torch.Tensor, slots: torch.Tensor, fmt: RowFormat) -> torch.Tensor:
    """Stored rows as bytes: ``[N, fmt.row_bytes]`` uint8, data, then scales."""
    if fmt.group_rows == 1:
        return pool[slots].contiguous().view(torch.uint8)
    return torch.cat(_load_grouped(pool, slots, fmt), dim=1)


def naive_put_row_bytes(pool: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor, fmt: RowFormat) -> None:
    """Put back what `naive_row_bytes` returned, at ``slots``."""
    if fmt.group_rows == 1:
        pool[slots] = stored.contiguous().view(fmt.storage_dtype)
    else:
        data, scales = stored.split((fmt.data_bytes, fmt.scale_bytes), dim=1)
        _store_grouped(pool, slots, data, scales, fmt)
