"""Compiles what most tests wait for, as many at a time as there are cores: `python -m tests.support.compile_first`.

Without it the first test that needs a kernel compiles it on one core while others wait for the same. What cannot be
compiled is told to the test that asks for it.
"""

from contextlib import suppress

from rwkv_rlhf.ops import build, cpu, gpu
from rwkv_rlhf.ops.calls import LAYOUTS
from tests.support import kernel_host
from tests.support.pretend_gpu.process import device_guard

HEADS = (32, 64)  # of the models of whole runs


def main() -> None:
    """The kernels for this processor, those that run as on a GPU, and the guard of the pretend GPU."""
    isa = cpu.instruction_set()
    kinds = [(f"wkv{version}", size) for version in (5, 6, 7) for size in HEADS]
    kinds += [(name, 0) for name in build.host_kernels()]
    recipes = [build.host_recipe(name, isa, size) for name, size in kinds]
    sources = [gpu.SOURCES / f"{op}.cu" for op in LAYOUTS]
    recipes += [kernel_host.recipe(source) for source in sources if source.is_file()]
    build.binaries(recipes)
    device_guard()


if __name__ == "__main__":
    with suppress(build.BuildError):
        main()
