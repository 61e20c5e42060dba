"""Functions on images: imported at start-up, never called."""

from torchvision._absent import absent, absent_attributes
from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode", "pil_to_tensor"]

pil_to_tensor = absent("torchvision.transforms.functional.pil_to_tensor")

__getattr__ = absent_attributes(__name__)
