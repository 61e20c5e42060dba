"""Functions on images: the module is imported at start-up, nothing in it is called."""

from torchvision._absent import absent_attributes

__getattr__ = absent_attributes(__name__)
