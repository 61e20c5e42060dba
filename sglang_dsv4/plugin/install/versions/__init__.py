"""What differs between the versions of SGLang that are served: one module for each, behind `SGLangVersion`."""

from sglang_dsv4.plugin.install.versions.choose import SERVED, check_installed, installed

__all__ = ["SERVED", "check_installed", "installed"]
