"""What pyproject.toml cannot say of a wheel: kernels go into the package, those for CPUs compiled.

src/rwkv_rlhf/ops/build.py knows which kernels there are, for which instruction sets, and how they are compiled.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.ops import build


class BuildPackage(build_py):
    """The package with cuda/ inside, and in cuda/built/ the CPU kernels, all or none of them."""

    compiled = False

    def run(self) -> None:
        """Copy, then compile; what an earlier build left behind is removed first."""
        if self.editable_mode:  # runs from the clone, which compiles on first use
            return super().run()
        package = Path(self.build_lib) / "rwkv_rlhf"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        shutil.copytree(build.KERNELS, package / "cuda")
        try:
            binaries = build.host_binaries()
        except build.BuildError as error:
            sys.stderr.write(f"WARNING: this wheel has no compiled kernels, each machine compiles its own: {error}\n")
            return
        for place, binary in binaries.items():
            target = package / "cuda" / place.relative_to(build.KERNELS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(binary, target)
        self.compiled = True


class Wheel(bdist_wheel):
    """A wheel of one platform if there are binaries inside, but of any Python 3: kernels know nothing of Python."""

    def run(self) -> None:
        """Build the package first: it decides what kind of wheel this is."""
        self.run_command("build_py")
        compiled = self.get_finalized_command("build_py").compiled
        self.root_is_pure = not compiled
        self.distribution.has_ext_modules = lambda: compiled  # which folder of the wheel setuptools puts files into
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, ABI, platform)."""
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
