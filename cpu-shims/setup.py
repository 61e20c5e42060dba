"""Adds the ``.pth`` file, which pyproject.toml alone cannot place beside the packages of a wheel."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPath(build_py):
    """Put the ``.pth`` file at the root of the wheel, hence into site-packages."""

    def run(self) -> None:
        super().run()
        self.copy_file("sglang_dsv4_cpu_shims.pth", self.build_lib)


setup(cmdclass={"build_py": BuildWithPath})
