"""Shape and dtype checks that name what was expected and what came."""

import torch


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise unless ``tensor`` has exactly this shape, one of these dtypes, and lives on this device.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.device.type != device.type:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
