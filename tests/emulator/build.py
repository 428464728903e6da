"""Compiles CUDA sources for the CPU, with the emulator of this folder.

``build`` makes a program or a shared object from ``.cu`` kernels and ``.cpp`` host code, in one of
four variants:

* ``plain``: fast; mistakes show as wrong results, NaN or the emulator's own errors;
* ``address``: AddressSanitizer and UndefinedBehaviorSanitizer;
* ``races``: ThreadSanitizer over the kernels, every CUDA thread a thread of its own;
* ``ucontext``: plain with the portable fiber switch that other processors than x86-64 use.

Results are kept in ``build/emulator`` under a hash of all that went into them: the compiler, its
command, the source and every header that it includes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"

VARIANTS = ("plain", "address", "races", "ucontext")
SYSTEM_CUDA = Path("/usr/local/cuda")
ENGINE = tuple(HERE / name for name in ("cuda_emulator.cpp", "fiber.cpp", "cuda_runtime.cpp"))

_SANITIZE = {
    "address": [
        "-fsanitize=address,undefined",
        # Slow to compile, and AddressSanitizer sees what they are for where it is used.
        "-fno-sanitize=vptr,null,object-size,pointer-overflow",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "races": ["-fsanitize=thread"],
}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "races": ("libtsan.so",)}


class Unavailable(RuntimeError):
    """This machine cannot build or run the asked-for variant; the message says what is missing."""


class CompileError(RuntimeError):
    """The compiler refused a source; the message is its output."""


# ---- what the machine offers -------------------------------------------------------------------


@functools.cache
def compiler() -> str:
    """The C++ compiler: ``$CXX``, else ``g++``, else ``c++``."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("the emulator needs a C++17 compiler: none of $CXX, g++ and c++ was found")


@functools.cache
def cuda_include() -> tuple[Path, ...]:
    """Folders with the CUDA headers, from ``$CUDA_HOME``, the nvidia wheels or a system toolkit."""
    candidates = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    candidates += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu[0-9]*"))[::-1]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append(SYSTEM_CUDA)
    searched = []
    for include in (home / "include" for home in candidates):
        folders = (include, include / "cccl")
        needed = ("cuda_runtime.h", "cuda_bf16.h", "crt/host_config.h", "nv/target")
        missing = [n for n in needed if not any((folder / n).is_file() for folder in folders)]
        if not missing:
            return tuple(folder for folder in folders if folder.is_dir())
        searched.append(f"{include} (without {', '.join(missing)})")
    raise Unavailable(
        "the emulator needs the CUDA headers, not the toolkit: install the wheels "
        "nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl, or set CUDA_HOME. Searched: "
        + "; ".join(searched)
    )


def _compiles(flags: Iterable[str], program: str = "int main() { return 0; }") -> Path | None:
    """The program that the compiler makes of a source with these flags, or None."""
    key = hashlib.sha256(repr((_compiler_version(), list(flags), program)).encode()).hexdigest()
    output = CACHE / f"probe-{key[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder, "probe")
        command = [compiler(), *flags, "-x", "c++", "-", "-o", str(made)]
        if subprocess.run(command, input=program, text=True, capture_output=True).returncode:
            return None
        os.replace(made, output)
    return output


@functools.cache
def supports(*flags: str) -> bool:
    """Whether the compiler knows these flags."""
    return _compiles(["-Werror", *flags]) is not None


@functools.cache
def _compiler_version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """AVX2 where both this processor and the compiler have it, else what every such machine has."""
    wanted = {"avx2", "bmi2", "fma", "f16c", "movbe", "abm"}
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpuinfo.is_file():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
        if wanted <= set(next(lines, "").split()) and supports("-march=x86-64-v3"):
            return ("-march=x86-64-v3",)
    return ()


@functools.cache
def require(variant: str) -> None:
    """Raises ``Unavailable`` if this machine cannot build and run the variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise Unavailable(
            "the emulator runs on Linux on x86-64 and aarch64, "
            f"not on {sys.platform} on {platform.machine()}"
        )
    cuda_include()
    if variant in _SANITIZE:
        _launcher(variant)


@functools.cache
def _launcher(variant: str) -> tuple[str, ...]:
    """What a sanitized program has to be started with: nothing, or less address randomisation.

    ThreadSanitizer of some compilers cannot run with the randomisation of some kernels.
    """
    if variant not in _SANITIZE:
        return ()
    probe = _compiles(_SANITIZE[variant])
    if probe is None:
        raise Unavailable(
            f"{compiler()} cannot link {_SANITIZE[variant][0]}: the sanitizers' runtime libraries "
            f"({', '.join(_RUNTIMES[variant])}) are missing"
        )
    launchers = [(), ("setarch", platform.machine(), "-R")] if shutil.which("setarch") else [()]
    for launcher in launchers:
        run = subprocess.run([*launcher, str(probe)], capture_output=True, text=True)
        if run.returncode == 0:
            return launcher
    raise Unavailable(f"a program with {_SANITIZE[variant][0]} does not run: {run.stderr.strip()}")


# ---- building ----------------------------------------------------------------------------------


def _flags(
    source: Path, variant: str, include: Iterable[Path], defines: Iterable[str], csrc: Path
) -> list[str]:
    level = "-O1" if variant == "address" else "-O2"  # its checks make optimising slow
    flags = ["-std=c++17", level, "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Wno-psabi", *_machine_flags(), f"-I{HERE}", f"-I{csrc}"]
    if variant in _SANITIZE:  # lines, for their reports; the emulator names them without it
        flags.append("-g1")
    if supports("-fno-gnu-unique"):  # a shared object's statics are its own
        flags.append("-fno-gnu-unique")
    flags += [part for folder in (*include, *cuda_include()) for part in ("-isystem", str(folder))]
    flags += [f"-D{define}" for define in defines]
    if source.suffix == ".cu":
        flags += ["-x", "c++", "-fno-strict-aliasing"]
        if supports("-ftrivial-auto-var-init=pattern"):  # registers start as garbage, not as zero
            flags.append("-ftrivial-auto-var-init=pattern")
    # The engine stands for the hardware and is never instrumented, but it tells the sanitizers what
    # it does. The race detector looks at kernels only.
    watched = variant in _SANITIZE and (variant == "address" or source.suffix == ".cu")
    if watched or (variant in _SANITIZE and source in ENGINE):
        flags.append(f"-DEMULATOR_{variant.upper()}")
    if watched and source not in ENGINE:
        flags += _SANITIZE[variant]
    if source.name == "fiber.cpp" and (variant == "ucontext" or platform.machine() != "x86_64"):
        flags.append("-DEMULATOR_UCONTEXT")
    return flags


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _file_digest(path: str, size: int, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _object(command: list[str], inputs: Iterable[str]) -> Path | None:
    """Where the object is kept that the command makes of these files, None if one is gone."""
    digests = []
    for path in inputs:
        try:
            stat = os.stat(path)
            digests.append(_file_digest(path, stat.st_size, stat.st_mtime_ns))
        except OSError:
            return None
    return CACHE / f"{_digest(_compiler_version(), command, digests)}.o"


def _read_dependencies(file: Path) -> list[str]:
    """The files that a compilation has read, from what ``-MD`` wrote."""
    _, _, names = file.read_text().replace("\\\n", " ").partition(": ")
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names) if name]


def _write(file: Path, text: str) -> None:
    """All of it or nothing: other processes may be reading."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        temporary.write(text)
    os.replace(temporary.name, file)


def _compile(command: list[str], known: Path) -> Path | None:
    """Runs the compiler and notes what it has read; None if some of that was edited meanwhile."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made, read, begin = Path(folder, "made.o"), Path(folder, "made.d"), time.time()
        said = _run([*command, "-MD", "-MF", str(read), "-o", str(made)])
        inputs = _read_dependencies(read)
        output = _object(command, inputs)
        if output is None or any(begin < os.stat(f).st_mtime < time.time() for f in inputs):
            return None
        _write(known, "\n".join(inputs))
        _write(output.with_suffix(".o.log"), said)
        os.replace(made, output)
    return output


def _run(command: list[str]) -> str:
    """Runs the compiler or the linker; returns its warnings."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise CompileError(f"{' '.join(command)}\n{run.stderr}")
    return run.stderr


def compile_object(
    source: Path,
    variant: str = "plain",
    *,
    include: Iterable[Path] = (),
    defines: Iterable[str] = (),
    flags: Iterable[str] = (),
    csrc: Path = ROOT / "csrc",
) -> Path:
    """Compiles one source; the compiler's warnings lie beside the result, in ``<result>.log``."""
    require(variant)
    command = [compiler(), *_flags(source, variant, include, defines, csrc), *flags]
    command += ["-c", str(source)]
    # Which headers the command reads is known from its last run, and is the same until one changes.
    known = CACHE / f"{_digest(_compiler_version(), command)}.inputs"
    output = _object(command, known.read_text().splitlines()) if known.exists() else None
    while output is None or not output.exists():
        output = _compile(command, known)
    return output


def complaints(
    source: Path, *, defines: Iterable[str] = (), flags: Iterable[str] = (), csrc: Path
) -> str:
    """All that the compiler has against a kernel, in `plain`; empty if it takes it."""
    command = [compiler(), *_flags(source, "plain", (), defines, csrc), *flags]
    command += ["-fsyntax-only", "-fmax-errors=0", str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stderr if run.returncode else ""


def precompile(
    names: Iterable[str],
    folder: Path,
    *,
    defines: Iterable[str] = (),
    flags: Iterable[str] = (),
    csrc: Path = ROOT / "csrc",
) -> list[str]:
    """Compiles system headers and the emulator's in advance, for kernels in `plain`.

    Returns what to add to the flags of ``compile_object``, which have to be the same otherwise.
    """
    header = folder / "precompiled.h"
    header.write_text("".join(f"#include {name}\n" for name in names))
    command = [compiler(), *_flags(Path("kernel.cu"), "plain", (), defines, csrc), *flags]
    command[command.index("-x") + 1] = "c++-header"
    _run([*command, str(header), "-o", f"{header}.gch"])
    return ["-include", str(header)]


def build(
    sources: Iterable[Path],
    variant: str = "plain",
    *,
    shared: bool = False,
    include: Iterable[Path] = (),
    defines: Iterable[str] = (),
    flags: Iterable[str] = (),
    csrc: Path = ROOT / "csrc",
    link: Iterable[str] = (),
) -> Path:
    """Builds a program, or with ``shared`` a shared object, from sources and the emulator.

    Args:
        sources: ``.cu`` files are kernels; ``.cpp`` files are host code, which the race detector
            does not look at; ``.o`` files, from ``compile_object``, are linked as they are.
        variant: one of ``VARIANTS``.
        include: further folders for headers, such as torch's; this folder and ``csrc`` are there.
        defines: macros, ``NAME`` or ``NAME=VALUE``.
        flags: further arguments for the compiler.
        csrc: where the project's own headers are.
        link: arguments for the linker.

    Raises:
        Unavailable: the machine lacks what the variant needs.
        CompileError: with the compiler's output.
    """
    options = {"include": list(include), "defines": list(defines), "flags": list(flags)}
    sources = [Path(source) for source in sources]
    require(variant)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(compile_object, source, variant) for source in ENGINE]
        tasks += [
            pool.submit(compile_object, source, variant, csrc=csrc, **options)
            for source in sources
            if source.suffix != ".o"
        ]
        objects = [str(task.result()) for task in tasks]
    objects += [str(source) for source in sources if source.suffix == ".o"]
    command = [compiler(), *_SANITIZE.get(variant, []), *(["-shared"] if shared else []), *objects]
    command += [*link, "-lpthread"]
    output = CACHE / f"{_digest(_compiler_version(), command)}{'.so' if shared else ''}"
    if not output.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder, "made")
            _run([*command, "-o", str(made)])
            os.replace(made, output)
    return output


def warnings(source: Path, variant: str = "plain", **options: Iterable[str]) -> str:
    """What the compiler said about a source; options are those of ``compile_object``."""
    return compile_object(source, variant, **options).with_suffix(".o.log").read_text()


# ---- running -----------------------------------------------------------------------------------


def environment(variant: str = "plain", seed: int = 1, *, preload: bool = False) -> dict[str, str]:
    """The environment for a process that runs a build.

    Args:
        variant: of the build.
        seed: of the schedule; 0 runs the threads in order.
        preload: set where a program without sanitizers (Python) loads a sanitized shared object.
    """
    settings = {
        "EMULATOR_SEED": str(seed),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    if preload and variant in _RUNTIMES:
        paths = [_runtime(name) for name in _RUNTIMES[variant]]
        settings["LD_PRELOAD"] = " ".join(paths)
        settings["OMP_NUM_THREADS"] = "1"  # ThreadSanitizer does not know OpenMP's barriers
    return {**os.environ, **settings}


@functools.cache
def _runtime(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise Unavailable(f"{compiler()} has no {name}")
    return path


def run(
    command: Iterable[str | Path],
    variant: str = "plain",
    *,
    seed: int = 1,
    preload: bool = False,
    extra: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a build, or a program that loads it; stdout and stderr come back together, in stdout."""
    return subprocess.run(
        [*_launcher(variant), *map(str, command)],
        env={**environment(variant, seed, preload=preload), **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def start(
    command: Iterable[str | Path], variant: str, *, extra: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Starts a program that loads a build; it reads lines from us, and writes lines to us."""
    return subprocess.Popen(
        [*_launcher(variant), *map(str, command)],
        env={**environment(variant, preload=True), **extra},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
