"""Memory that attention keeps from step to step."""

import torch

from dsv4_kernels.memory import empty
from sglang_dsv4.attention.flashinfer_schedule import Partials


class Workspace:
    """Named buffers and the results of pieces, used by one stream.

    Args:
        partials (Partials): results of pieces.
        device (torch.device): where the buffers live.
    """

    def __init__(self, partials: Partials, device: torch.device) -> None:
        self.partials = partials
        self._device = device
        self._sealed = False
        self._buffers: dict[str, torch.Tensor] = {}

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.partials.floats, *self._buffers.values()]

    def seal(self) -> None:
        """From now on graphs may hold the buffers' addresses: none is replaced by a larger one any more."""
        self._sealed = True

    def buffer(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The first ``count`` elements of a buffer.

        Raises:
            ValueError: it is shorter, and the workspace is sealed.
        """
        found = self._buffers.get(name)
        if found is None or found.numel() < count:
            self._check_growth(name, found, count)
            found = self._buffers[name] = empty((count,), dtype, self._device)
        return found[:count]

    def counting(self, count: int) -> torch.Tensor:
        """``0 .. count - 1``, int32."""
        found = self._buffers.get("counting")
        if found is None or found.numel() < count:
            self._check_growth("counting", found, count)
            found = torch.arange(count, dtype=torch.int32, device=self._device)
            self._buffers["counting"] = found
        return found[:count]

    def _check_growth(self, name: str, found: torch.Tensor | None, count: int) -> None:
        if found is not None and self._sealed:
            raise ValueError(
                f"{name}: expected at most {found.numel()} elements, since a graph may have captured the buffer, got {count}; "
                "plan the largest shape first"
            )
