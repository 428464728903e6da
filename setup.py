"""Door 1: pip. Hands build_config.py's native build to torch's BuildExtension."""

import os
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip does not put the project's folder there
import build_config  # noqa: E402
import build_report  # noqa: E402

try:
    build = build_config.configure()
    requires_torch = build_config.torch_requirement()
except build_config.BuildError as error:
    sys.exit(f"hope_ext: {error}")

# torch.utils.cpp_extension reads CUDA_HOME when it is imported, the others when it compiles.
if build.cuda_home:
    os.environ["CUDA_HOME"] = str(build.cuda_home)
    wrapper = [sys.executable, str(ROOT / "build_report.py"), str(build.cuda_home / "bin/nvcc")]
    os.environ["PYTORCH_NVCC"] = shlex.join(wrapper)
os.environ["MAX_JOBS"] = str(build_config.jobs())
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # ninja
from torch.utils.cpp_extension import BuildExtension  # noqa: E402


class BuildNative(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(
            build.build_dir
        )  # not pip's temporary folder: later builds are incremental
        if not self.use_ninja:
            sys.exit(
                "hope_ext: ninja is needed to build; install it, for example: pip install ninja"
            )

    def run(self):
        super().run()
        package = Path(self.get_ext_fullpath(build_config.EXTENSION)).parent
        build_report.merge(build.build_dir, package)


def system_includes(directories):
    """Flags for headers that are not ours: their warnings are not shown."""
    return [f"-isystem{directory}" for directory in directories]


setup(
    ext_modules=[
        Extension(
            build_config.EXTENSION,
            build.sources,
            include_dirs=list(build.include_dirs),
            library_dirs=list(build.library_dirs),
            libraries=list(build.libraries),
            extra_compile_args={
                "cxx": [*build.cxx_flags, *system_includes(build.torch_include_dirs)],
                "nvcc": list(build.nvcc_flags),
            },
            extra_link_args=list(build.link_flags),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildNative},
    # torch's C++ ABI holds for one minor version: the wheel asks for the one it was built against.
    install_requires=[requires_torch, "numpy", "safetensors", "tqdm", "matplotlib"],
)
