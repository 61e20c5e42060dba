"""The facts about a device that attention depends on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """CUDA capability and SM count of a torch device.

    Attributes:
        device (torch.device): the device.
        capability (tuple[int, int] | None): CUDA compute capability; None for a CPU.
        num_sms (int): streaming multiprocessors; 0 for a CPU.
    """

    device: torch.device
    capability: tuple[int, int] | None
    num_sms: int

    def __str__(self) -> str:
        if self.capability is None:
            return str(self.device)
        return f"{self.device} (SM{self.capability[0]}{self.capability[1]})"


def device_of(device: torch.device) -> Device:
    """Ask the driver."""
    if device.type != "cuda":
        return Device(device, None, 0)
    properties = torch.cuda.get_device_properties(device)
    return Device(device, (properties.major, properties.minor), properties.multi_processor_count)
