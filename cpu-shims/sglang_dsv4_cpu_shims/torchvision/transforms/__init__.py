"""Image transforms: transformers builds a table of the interpolation modes when it is imported."""

from enum import Enum

from torchvision._absent import absent_attributes


class InterpolationMode(Enum):
    """The real names and values."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


__getattr__ = absent_attributes(__name__)
