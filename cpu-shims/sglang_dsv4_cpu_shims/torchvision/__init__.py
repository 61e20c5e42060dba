"""Stand-in for torchvision: the names that SGLang and transformers import at start-up, and no image code."""

from torchvision._absent import absent_attributes

# The version of torchvision that belongs to the pinned torch; transformers compares it.
__version__ = "0.28.0+standin"

__getattr__ = absent_attributes(__name__)
