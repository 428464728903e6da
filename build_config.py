"""The one description of the native build: sources, flags, architectures, and where nvcc is.

setup.py (pip) and CMakeLists.txt (the edit loop) both read it, so that they cannot disagree. It
needs the standard library only, and torch in the functions that describe a build against torch.

    python build_config.py check                  can this machine build? (needs no torch)
    python build_config.py requirements NAME...   packages to install, by line: see requirements()
    python build_config.py cmake BUILD_DIR        write BUILD_DIR/build.json

Environment: HOPE_CUDA (0: CPU only, 1: CUDA, unset: CUDA if torch has it), HOPE_LINEINFO (1: source
lines in the kernels, for profilers), TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EXTENSION = "hope_ext._C"

# 8.0's PTX is what later GPUs run.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0"
ARCHITECTURES = (
    "8.0",
    "8.6",
    "8.7",
    "8.9",
    "9.0",
    "9.0a",
    "10.0",
    "10.0a",
    "10.3",
    "10.3a",
    "12.0",
    "12.0a",
)

WARNINGS = ("-Wall", "-Wextra")
# -g0: Python's own flags may say -g, which makes the extension ten times as large.
# -fno-math-errno: square roots of a loop are vectors only where nobody asks for errno.
CXX_FLAGS = (
    *("-O3", "-fno-math-errno", "-g0", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *WARNINGS,
)
NVCC_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "--ptxas-options=-v",  # registers and spills, which build_report.py collects
    f"--compiler-options=-fPIC,-fvisibility=hidden,{','.join(WARNINGS)}",
    # torch's BuildExtension adds these; named here so that CMake compiles the same code.
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
)
DESCRIPTION = "build.json"  # in the build folder, for CMake and build_report.py
BYTES_PER_JOB = 2 << 30  # one g++ on ATen's headers, or one nvcc on a large kernel file


class BuildError(Exception):
    """This machine or this environment cannot build; the message says why and what to do."""


@dataclass(frozen=True)
class NativeBuild:
    """One build: everything a door needs to know, with paths absolute except the sources."""

    torch: str  # torch's version, "2.11.0+cu130"
    cuda: str | None  # nvcc's version, "13.0"; None in a CPU-only build
    cuda_home: Path | None
    architectures: tuple[str, ...]
    build_dir: Path
    host_sources: tuple[str, ...]  # see torch's headers
    cpu_sources: tuple[str, ...]  # torch-free
    cuda_sources: tuple[str, ...]  # torch-free
    cxx_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...]
    include_dirs: tuple[str, ...]  # for every source
    torch_include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]
    libraries: tuple[str, ...]
    link_flags: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        return [*self.host_sources, *self.cpu_sources, *self.cuda_sources]


def configure(build_dir: Path | None = None) -> NativeBuild:
    """Settle the build and write its generated files into ``build_dir`` (default: build/<tag>).

    Raises:
        BuildError: something that the build needs is missing or does not fit.
    """
    check_machine()
    torch = _import_torch()
    with_cuda = wants_cuda(torch)
    cuda_home, cuda = find_cuda(torch.version.cuda) if with_cuda else (None, None)
    if build_dir is None:
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        build_dir = build_dir.with_name(build_dir.name + ("" if with_cuda else "-nocuda"))
    generated = build_dir / "generated"
    generated.mkdir(parents=True, exist_ok=True)

    torch_includes, torch_library_dir = torch_dirs(torch)
    include_dirs, library_dirs = [ROOT / "csrc", generated], [torch_library_dir]
    libraries = ["c10", "torch_cpu", "torch"]
    standard = cxx_standard(torch)
    cxx_flags, nvcc_flags = [standard, *CXX_FLAGS], [standard, *NVCC_FLAGS]
    architectures: tuple[str, ...] = ()
    if cuda_home:
        architectures = requested_architectures()
        torch_includes.append(cuda_home / "include")
        library_dirs.append(_cudart_dir(cuda_home, build_dir))
        libraries += ["cudart", "c10_cuda"]
        cxx_flags.append("-DHOPE_WITH_CUDA")
        nvcc_flags += ["-DHOPE_WITH_CUDA", *line_info(), *_gencode(architectures)]
    # g++'s OpenMP runtime is the one that torch has loaded; clang calls another: link it.
    link_flags = ["-fopenmp"] if _is_clang() else []

    build = NativeBuild(
        torch=str(torch.__version__),
        cuda=cuda,
        cuda_home=cuda_home,
        architectures=architectures,
        build_dir=build_dir,
        host_sources=host_sources(),
        cpu_sources=_sources("*_cpu.cpp"),
        cuda_sources=cuda_sources() if cuda_home else (),
        cxx_flags=tuple(cxx_flags),
        nvcc_flags=tuple(nvcc_flags),
        include_dirs=tuple(map(str, include_dirs)),
        torch_include_dirs=tuple(map(str, torch_includes)),
        library_dirs=tuple(map(str, library_dirs)),
        libraries=tuple(libraries),
        link_flags=tuple(link_flags),
    )
    _write_if_changed(generated / "build_facts.h", _facts_header(build))
    _write_if_changed(build_dir / DESCRIPTION, json.dumps(_description(build), indent=1))
    return build


# --- the machine ----------------------------------------------------------------------------------


def check_machine() -> None:
    """Raise BuildError unless Python's headers and a C++ compiler are here."""
    if not sys.platform.startswith("linux"):
        raise BuildError(
            f"the native build is for Linux, this is {sys.platform}; "
            "HOPE_REFERENCE=1 runs without it"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise BuildError(
            f"Python's headers are missing ({header}); install them, "
            "for example: apt install python3-dev"
        )
    if not shutil.which(compiler()):
        raise BuildError(
            f"no C++ compiler: {compiler()!r} is not on PATH; install one, "
            "for example: apt install g++ (or name yours by CXX=)"
        )


def check_venv() -> None:
    """Raise BuildError unless this Python can make a virtual environment with pip in it."""
    try:
        import ensurepip  # noqa: F401  (Debian's python3 has it only with python3-venv)
        import venv  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"this Python cannot make a virtual environment ({error}); install its venv module, "
            "for example: apt install python3-venv"
        ) from error


def compiler() -> str:
    """The C++ compiler, which torch's BuildExtension reads from the same variable."""
    return os.environ.get("CXX", "c++").split()[0]


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else one per core as far as the memory goes."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    available = [int(re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))[1]) << 10]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        available.append(int(text))
    return max(1, min(len(os.sched_getaffinity(0)), min(available) // BYTES_PER_JOB))


def _is_clang() -> bool:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    return "clang" in version.stdout


# --- CUDA -----------------------------------------------------------------------------------------


def wants_cuda(torch) -> bool:
    """Whether to build the CUDA kernels: HOPE_CUDA, else whether torch is a CUDA build."""
    choice = os.environ.get("HOPE_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"HOPE_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "1" and not torch.version.cuda:
        raise BuildError(f"HOPE_CUDA=1, but torch {torch.__version__} is a build without CUDA")
    if choice == "" and not torch.version.cuda:
        print(
            f"hope_ext: torch {torch.__version__} has no CUDA: building the CPU kernels only",
            file=sys.stderr,
        )
    return choice != "0" and bool(torch.version.cuda)


def line_info() -> tuple[str, ...]:
    """nvcc's flag for HOPE_LINEINFO=1. To say where in the sources an instruction comes from takes
    ptxas time, and no kernel runs otherwise for it."""
    choice = os.environ.get("HOPE_LINEINFO", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"HOPE_LINEINFO must be 0, 1 or unset, got {choice!r}")
    return ("-lineinfo",) if choice == "1" else ()


def find_cuda(wanted: str) -> tuple[Path, str]:
    """The toolkit for torch's CUDA version ``wanted``, as (home, its version).

    The system's if it has nvcc, headers and the runtime, and exactly that version; else nvcc from
    the nvidia-cuda-* wheels; else a toolkit of the same major version, which torch also accepts.
    """
    toolkits = [(home, _nvcc_version(home)) for home in _cuda_homes(wanted) if _is_complete(home)]
    for fits in (
        lambda version: version == wanted,
        lambda v: v.split(".")[0] == wanted.split(".")[0],
    ):
        for home, version in toolkits:
            if fits(version):
                return home, version
    wheels = " ".join(f"'{requirement}'" for requirement in requirements(["cuda-build"]))
    found = ", ".join(f"{version} in {home}" for home, version in toolkits) or "none"
    raise BuildError(
        f"torch was built with CUDA {wanted}, and no CUDA compiler (nvcc) that fits is here "
        f"(found: {found}). Install it with pip: {wheels}; "
        "or set CUDA_HOME to a fitting toolkit; or set HOPE_CUDA=0 to build the CPU kernels only"
    )


def _cuda_homes(wanted: str) -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        named.append(Path(nvcc).resolve().parent.parent)
    named += [f"/usr/local/cuda-{wanted}", "/usr/local/cuda"]
    try:
        import nvidia  # the namespace package of NVIDIA's wheels
    except ImportError:
        wheels = []
    else:
        wheels = [Path(path, f"cu{wanted.split('.')[0]}") for path in nvidia.__path__]
    return list(dict.fromkeys([*(Path(home) for home in named if home), *wheels]))


def _is_complete(home: Path) -> bool:
    needed = ("bin/nvcc", "include/cuda_runtime.h", "include/crt/host_config.h")
    return all((home / file).exists() for file in needed) and _find_cudart(home) is not None


def _nvcc_version(home: Path) -> str:
    said = subprocess.run(
        [home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def _find_cudart(home: Path) -> Path | None:
    found = (path for lib in ("lib64", "lib") for path in sorted(home.glob(f"{lib}/libcudart.so*")))
    return next(found, None)


def _cudart_dir(home: Path, build_dir: Path) -> Path:
    """A folder with libcudart.so for the linker: the wheels have its versioned name only."""
    cudart = _find_cudart(home)
    if cudart.name == "libcudart.so":
        return cudart.parent
    link = build_dir / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(cudart)
    return link.parent


def requested_architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or the default, as a tuple of "major.minor[a][+PTX]"."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    entries = tuple(dict.fromkeys(text.replace(";", " ").replace(",", " ").split()))
    for entry in entries:
        if entry.removesuffix("+PTX") not in ARCHITECTURES:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not supported; expected a list such as "
                f"'{DEFAULT_ARCHITECTURES}' of {', '.join(ARCHITECTURES)}, with or without +PTX"
            )
    return entries


def _gencode(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's flags. PTX is a third to a half of its work, so it is made once, for the oldest, and
    all machine code comes from it: it is the same as from their own, since no kernel says anything
    that only newer PTX can. "9.0a" and the like need PTX of their own, and so does an entry with
    "+PTX".
    """
    numbers = [entry.removesuffix("+PTX").replace(".", "") for entry in architectures]
    oldest = min((number for number in numbers if number.isdigit()), key=int, default="")
    flags = []
    for entry, number in zip(architectures, numbers, strict=True):
        own = entry.endswith("+PTX") or not number.isdigit()
        ptx = number if own else oldest
        flags.append(f"-gencode=arch=compute_{ptx},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# --- sources, packages, facts ---------------------------------------------------------------------


def host_sources() -> tuple[str, ...]:
    return ("csrc/module.cpp", *_sources("*.cpp", but_not="*_cpu.cpp"))


def cuda_sources() -> tuple[str, ...]:
    return _sources("*_cuda.cu")


def _sources(pattern: str, but_not: str = "") -> tuple[str, ...]:
    found = sorted((ROOT / "csrc").glob(f"*/{pattern}"))
    return tuple(
        str(path.relative_to(ROOT)) for path in found if not (but_not and path.match(but_not))
    )


def torch_dirs(torch) -> tuple[list[Path], Path]:
    """The folders of torch's headers, and that of its libraries."""
    home = Path(torch.__file__).parent
    return [home / "include", home / "include/torch/csrc/api/include"], home / "lib"


def cxx_standard(torch) -> str:
    """What torch's headers are written in."""
    return "-std=c++20" if _release(torch.__version__) >= (2, 12) else "-std=c++17"


def project() -> dict:
    """pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(names: list[str]) -> list[str]:
    """Packages of pyproject.toml.

    A name is that of an extra; or "torch" or "build", from the build system's requirements; or
    "nvcc", the CUDA compiler's wheels if the build needs them and [] if it does not.
    """
    metadata = project()
    system = metadata["build-system"]["requires"]
    known = dict(metadata["project"]["optional-dependencies"])
    known["torch"] = [package for package in system if package.startswith("torch")]
    known["build"] = [p for p in system if p not in known["torch"] + known["cuda-build"]]
    if "nvcc" in names:
        known["nvcc"] = known["cuda-build"] if _needs_nvcc_wheels() else []
    if unknown := set(names) - set(known):
        raise BuildError(f"expected names among {sorted(known)}, got {sorted(unknown)}")
    return [package for name in names for package in known[name]]


def _needs_nvcc_wheels() -> bool:
    torch = _import_torch()
    if not wants_cuda(torch):
        return False
    try:
        find_cuda(torch.version.cuda)
    except BuildError:
        return True
    return False


def torch_requirement() -> str:
    """The torch that an extension built here runs with: its C++ ABI holds for a minor version."""
    major, minor = _release(_import_torch().__version__)
    return f"torch=={major}.{minor}.*"


def revision() -> str:
    """The git commit that is built, "-dirty" if files differ from it; "" outside a checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _facts_header(build: NativeBuild) -> str:
    facts = {
        "VERSION": project()["project"]["version"],
        "TORCH": build.torch,
        "CUDA": build.cuda or "",
        "ARCHITECTURES": ";".join(build.architectures),
        "REVISION": revision(),
        "CXX_FLAGS": " ".join(build.cxx_flags),
        "NVCC_FLAGS": " ".join(build.nvcc_flags) if build.cuda else "",
    }
    lines = [f"#define HOPE_BUILD_{name} {json.dumps(value)}" for name, value in facts.items()]
    return "// Written by build_config.py.\n#pragma once\n" + "\n".join(lines) + "\n"


def _description(build: NativeBuild) -> dict[str, str]:
    """The build as strings, with CMake's lists."""
    described = {
        key: ";".join(value) if isinstance(value, tuple) else str(value or "")
        for key, value in vars(build).items()
    }
    described["python_include"] = sysconfig.get_paths()["include"]
    described["suffix"] = sysconfig.get_config_var("EXT_SUFFIX")
    return described


def _import_torch():
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch >= 2.9 is needed to build ({error}); install it with pip first"
        ) from error
    if _release(torch.__version__) < (2, 9):
        raise BuildError(f"torch >= 2.9 is needed to build, this is {torch.__version__}")
    return torch


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _read(path: str) -> str:
    return Path(path).read_text()


def _write_if_changed(path: Path, text: str) -> None:
    """Keep the time stamp of an unchanged file, so that nothing is compiled again for it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# --- commands -------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    try:
        if command == "check" and not rest:
            check_machine()
            check_venv()
        elif command == "requirements" and rest:
            print("".join(f"{package}\n" for package in requirements(rest)), end="")
        elif command == "cmake" and len(rest) == 1:
            configure(Path(rest[0]).resolve())
        else:
            print(__doc__)
            return 2
    except BuildError as error:
        print(f"hope_ext: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
