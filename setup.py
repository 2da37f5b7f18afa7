"""Builds the extension by calling CMake; everything about the build is in CMakeLists.txt.

Written by hand: scikit-build-core's plugin for setuptools (tried: 1.1.2) keeps the environment
variables, wheels and editable installs, but lacks two things that `make build-gpu` needs. Where it
cannot be installed, `setup.py build_ext --inplace` warns of an unknown option, builds nothing and
exits with 0. And it empties its build folder before every build, so that all is compiled again (for
sm_90 on two cores 40 s, where this takes 1 s if nothing has changed).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake target where setuptools wants the extension."""

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve() / "cmake"
        options = [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
        ]
        ninja = shutil.which("ninja")
        if ninja:  # an isolated build's ninja is gone at the next one: do not trust the cache
            options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        # Always named, since the folder may remember what an earlier build asked for.
        for name, default in (("PATCHSVDD_CUDA", "AUTO"), ("PATCHSVDD_CUDA_ARCHITECTURES", "")):
            options.append(f"-D{name}={os.environ.get(name) or default}")
        cmake = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *options]
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(["cmake", "--install", str(build_dir)], check=True)


setup(
    ext_modules=[Extension("patchsvdd_fast.ops._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
