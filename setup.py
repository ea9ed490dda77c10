"""Builds the package with its compiled engine. Everything declarative is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# By its path: importing the package takes NumPy, which is not there while it is built.
NATIVE = runpy.run_path(str(Path(__file__).parent / "rd_deploy" / "native" / "build.py"))


class BuildEngine(build_ext):
    """The engine is a plain shared library, loaded by ctypes: rd_deploy/native/build.py knows how it is made."""

    def build_extension(self, extension: Extension) -> None:
        try:
            build = NATIVE["Build"](NATIVE["Compiler"].find())
            build.library(Path(self.get_ext_fullpath(extension.name)).parent)
        except (NATIVE["BuildError"], OSError) as error:
            raise CompileError(str(error)) from error

    def get_ext_filename(self, name: str) -> str:
        """Its file has one name for every Python."""
        return str(Path(*name.split(".")[:-1]) / NATIVE["LIBRARY"])


class PlatformWheel(bdist_wheel):
    """The wheel fits one platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("rd_deploy.native.librd", sources=[])],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": PlatformWheel},
)
