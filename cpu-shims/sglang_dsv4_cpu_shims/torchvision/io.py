"""Image files: imported at start-up, never read."""

from torchvision._absent import absent, absent_attributes

decode_jpeg = absent("torchvision.io.decode_jpeg")
decode_image = absent("torchvision.io.decode_image")
ImageReadMode = absent("torchvision.io.ImageReadMode")

__getattr__ = absent_attributes(__name__)
