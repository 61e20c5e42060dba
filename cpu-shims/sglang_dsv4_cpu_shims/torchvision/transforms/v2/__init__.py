"""The second generation of transforms: only its module of functions is imported."""

from torchvision._absent import absent_attributes

__getattr__ = absent_attributes(__name__)
