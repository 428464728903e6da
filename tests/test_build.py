"""The build: what it makes, what it reports, and what it says when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import build_config
import build_report
import hope_ext
from build_config import BuildError
from hope_ext import _build, _load

BUILD = hope_ext.build_info()
cuda_build = pytest.mark.skipif(BUILD["cuda"] is None, reason="this build has no CUDA kernels")


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


# ---- what was built ------------------------------------------------------------------------------


def test_build_info_states_this_build():
    assert BUILD["version"] == build_config.project()["project"]["version"] == hope_ext.__version__
    assert BUILD["torch"] == torch.__version__
    assert re.match(r"(g\+\+|clang\+\+) \d+\.", BUILD["compiler"])
    assert "-O3" in BUILD["flags"]["c++"]
    assert "-march=native" not in str(BUILD["flags"])
    if BUILD["cuda"] is None:
        assert BUILD["architectures"] == []
    else:
        assert BUILD["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert BUILD["architectures"] == list(build_config.requested_architectures())


def test_a_build_without_cuda_reports_no_kernels():
    assert bool(hope_ext.kernel_report()) == (BUILD["cuda"] is not None)


@cuda_build
def test_kernel_report_has_every_kernel_on_every_architecture():
    rows = hope_ext.kernel_report()
    built = {entry.removesuffix("+PTX") for entry in BUILD["architectures"]}
    for name in {row["name"] for row in rows}:
        assert {row["architecture"] for row in rows if row["name"] == name} == built, name
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert 32 <= row["threads"] <= 1024
        assert row["shared_bytes"] >= 0
        assert row["compile_seconds"] > 0
        assert ("occupancy" in row) == torch.cuda.is_available()


# ---- what the compiler said ----------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 3.1 ms
kernel.cu(5): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : Compiling entry function 'g' for 'sm_120'
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_ptxas_report_is_read():
    kernels, rest = build_report.parse_ptxas(PTXAS)
    f = {"registers": 40, "shared_bytes": 4096, "spill_bytes": 20}
    g = {"registers": 8, "shared_bytes": 0, "spill_bytes": 8}
    assert kernels == [
        {"symbol": "_Z1fPf", "architecture": "9.0a", **f},
        {"symbol": "g", "architecture": "12.0", **g},
    ]
    assert rest.startswith("kernel.cu(5): warning")
    assert "ptxas" not in rest


def test_launch_bounds_are_read():
    ptx = """
.version 9.0
.target sm_90a
.visible .entry f(
\t.param .u64 f_param_0
)
.maxntid 32, 4, 1
.minnctapersm 2
{ ret; }
.visible .entry g(.param .u64 g_param_0)
{ ret; }
.entry h()
.reqntid 96
{ ret; }
"""
    assert build_report.launch_bounds(ptx) == {("f", "9.0a"): 128, ("h", "9.0a"): 96}


def test_symbols_are_demangled():
    assert build_report.demangle("_ZN4hope1fILi4EEEvPf") == "void hope::f<4>(float*)"
    assert build_report.demangle("plain_c_name") == "plain_c_name"


H100 = SimpleNamespace(
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=233472,
)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "occupancy"),
    [(32, 256, 0, 1.0), (255, 128, 0, 0.125), (32, 128, 115712, 0.125), (33, 1024, 0, 0.5)],
)
def test_occupancy(registers, threads, shared, occupancy):
    row = {"registers": registers, "threads": threads, "shared_bytes": shared}
    assert _build._occupancy(row, H100) == occupancy


def test_which_code_runs_on_which_gpu():
    runs = {code: _build._runs(code, (9, 0)) for code in ("8.0", "9.0", "9.0a", "10.0")}
    assert runs == {"8.0": False, "9.0": True, "9.0a": True, "10.0": False}
    assert _build._runs("8.0", (8, 6))
    assert not _build._runs("8.6", (8, 0))


# ---- what the build needs ------------------------------------------------------------------------


def fake_torch(cuda: str | None) -> SimpleNamespace:
    return SimpleNamespace(__version__="2.11.0", version=SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("choice", "cuda", "expected"),
    [("", "13.0", True), ("1", "13.0", True), ("0", "13.0", False), ("", None, False)],
)
def test_hope_cuda(monkeypatch, choice, cuda, expected):
    monkeypatch.setenv("HOPE_CUDA", choice)
    assert build_config.wants_cuda(fake_torch(cuda)) == expected


def test_a_cpu_only_build_says_so(monkeypatch, capsys):
    monkeypatch.delenv("HOPE_CUDA", raising=False)
    build_config.wants_cuda(fake_torch(None))
    assert "CPU kernels only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "message"), [("1", "build without CUDA"), ("yes", "HOPE_CUDA must be 0, 1 or unset")]
)
def test_hope_cuda_that_cannot_be_met(monkeypatch, choice, message):
    monkeypatch.setenv("HOPE_CUDA", choice)
    with pytest.raises(BuildError, match=message):
        build_config.wants_cuda(fake_torch(None))


def test_line_info_is_a_choice(monkeypatch):
    monkeypatch.delenv("HOPE_LINEINFO", raising=False)
    assert build_config.line_info() == ()
    monkeypatch.setenv("HOPE_LINEINFO", "1")
    assert build_config.line_info() == ("-lineinfo",)
    monkeypatch.setenv("HOPE_LINEINFO", "yes")
    with pytest.raises(BuildError, match="HOPE_LINEINFO must be 0, 1 or unset, got 'yes'"):
        build_config.line_info()


def toolkit(home: Path, version: str, cudart: str = "lib64/libcudart.so") -> Path:
    for file in ("bin/nvcc", "include/cuda_runtime.h", "include/crt/host_config.h", cudart):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(f"#!/bin/sh\necho 'release {version}, V{version}.1'\n")
    (home / "bin/nvcc").chmod(0o755)
    return home


def test_the_fitting_toolkit_is_chosen(monkeypatch, tmp_path):
    old, near = toolkit(tmp_path / "old", "12.8"), toolkit(tmp_path / "near", "13.1")
    exact = toolkit(tmp_path / "exact", "13.0", "lib/libcudart.so.13")
    partial = toolkit(tmp_path / "partial", "13.0")
    (partial / "include/cuda_runtime.h").unlink()
    homes = [old, partial, near, exact]
    monkeypatch.setattr(build_config, "_cuda_homes", lambda wanted: homes)
    assert build_config.find_cuda("13.0") == (exact, "13.0")
    homes.remove(exact)
    assert build_config.find_cuda("13.0") == (near, "13.1")
    homes.remove(near)
    with pytest.raises(BuildError, match=r"no CUDA compiler.*found: 12.8 in .*nvidia-cuda-nvcc"):
        build_config.find_cuda("13.0")


def test_the_wheels_runtime_is_given_the_name_that_the_linker_looks_for(tmp_path):
    home = toolkit(tmp_path / "wheels", "13.0", "lib/libcudart.so.13")
    folder = build_config._cudart_dir(home, tmp_path / "build")
    assert (folder / "libcudart.so").resolve() == home / "lib/libcudart.so.13"


def test_cuda_home_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_config._cuda_homes("13.0")[0] == tmp_path


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert build_config.requested_architectures() == ("8.6", "9.0a", "12.0+PTX")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert build_config.requested_architectures() == ("8.0+PTX", "9.0")


def test_code_is_made_of_the_oldest_ptx_but_where_another_is_needed():
    def gencode(*architectures):
        flag = "-gencode=arch=compute_"
        return [f.removeprefix(flag) for f in build_config._gencode(architectures)]

    assert gencode("8.0+PTX", "9.0") == ["80,code=sm_80", "80,code=compute_80", "80,code=sm_90"]
    assert gencode("10.0", "8.6") == ["86,code=sm_100", "86,code=sm_86"]
    assert gencode("9.0a", "12.0+PTX") == [
        "90a,code=sm_90a",
        "120,code=sm_120",
        "120,code=compute_120",
    ]
    assert gencode("9.0a") == ["90a,code=sm_90a"]


@pytest.mark.parametrize("entry", ["7.5", "12.1", "13.0", "Hopper", "sm_90"])
def test_unsupported_architectures_are_named(monkeypatch, entry):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    with pytest.raises(BuildError, match=rf"TORCH_CUDA_ARCH_LIST: '{entry}' is not supported"):
        build_config.requested_architectures()


def test_sources_are_found_by_rule(root):
    build = build_config.configure()
    in_tree = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*.c*")}
    in_tree -= {path for path in in_tree if path.endswith(".cuh")}
    if build.cuda is None:
        in_tree = {path for path in in_tree if not path.endswith(".cu")}
    assert set(build.sources) == in_tree
    assert len(build.sources) == len(set(build.sources))
    assert all(source.endswith("_cpu.cpp") for source in build.cpu_sources)
    assert not any(source.endswith("_cpu.cpp") for source in build.host_sources)


def test_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build_config.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= build_config.jobs() <= os.cpu_count()
    monkeypatch.setattr(build_config, "BYTES_PER_JOB", 1 << 60)
    assert build_config.jobs() == 1


def test_packages_are_described_once():
    """The isolated build, make and the extras install the same packages."""
    system = build_config.project()["build-system"]["requires"]
    parts = [build_config.requirements([name]) for name in ("build", "torch", "cuda-build")]
    assert sorted(system) == sorted(package for part in parts for package in part)
    assert [part[0].split(">")[0].split("=")[0] for part in parts[:2]] == ["setuptools", "torch"]
    with pytest.raises(BuildError, match="expected names among"):
        build_config.requirements(["nonsense"])


def test_a_missing_compiler_is_named(root):
    script = root / "build_config.py"
    done = run(sys.executable, script, "check", env={**os.environ, "CXX": "no-such-compiler"})
    assert done.returncode == 3
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in done.stderr


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build_config.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(BuildError, match=r"Python's headers are missing.*python3-dev"):
        build_config.check_machine()


def test_a_missing_venv_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(BuildError, match=r"cannot make a virtual environment.*python3-venv"):
        build_config.check_venv()


# ---- the commands --------------------------------------------------------------------------------

make = pytest.mark.skipif(not shutil.which("make"), reason="no make")


@make
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYTHON": "no-such-python"}, "no Python: no-such-python is not on PATH"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: 'no-such-compiler'"),
        ({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}, "Is the package index reachable?"),
    ],
)
def test_make_names_what_is_missing(root, tmp_path, settings, message):
    """In a new environment, so that nothing of this one hides it."""
    environment = {"PYTHON": sys.executable, **os.environ, **settings}
    command = [
        "make",
        "-C",
        root,
        f"VENV={tmp_path / 'venv'}",
        f"{tmp_path}/venv/.hope-dependencies",
    ]
    done = run(
        *command, env={key: value for key, value in environment.items() if "MAKE" not in key}
    )
    assert done.returncode != 0
    assert message in done.stderr


@make
def test_make_refuses_an_old_python(root, tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    target = f"{tmp_path}/venv/.hope-dependencies"
    done = run("make", "-C", root, f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", target)
    assert done.returncode != 0
    assert "Python >= 3.10 is needed: this is Python 3.9.2" in done.stderr


@make
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("train", "bin/hope train --flag"),
        ("test", "bin/python tests/side_by_side.py --flag"),
        ("bench", "bin/python -m benchmarks.ops --op titans --flag"),
        ("profile", "bin/python -m benchmarks.ops --op titans --profile --flag"),
        ("lint", "bin/clang-format --dry-run -Werror csrc/module.cpp"),
        ("format", "bin/clang-format -i csrc/module.cpp"),
        ("clean", "rm -rf build"),
        ("help", "make train"),
    ],
)
def test_make_runs(root, target, command):
    assert command in run("make", "-n", "-C", root, target, "ARGS=--flag", check=True).stdout


def test_the_wheel_ships_what_runs_and_nothing_else(root, tmp_path):
    environment = {**os.environ, "HOPE_CUDA": "0" if BUILD["cuda"] is None else "1"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = run(*pip, "-w", tmp_path, root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("hope_ext-*.whl"))) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(next(f for f in files if f.endswith("/METADATA"))).decode()
    shipped = {f for f in files if ".dist-info/" not in f}
    python = {str(path.relative_to(root)) for path in (root / "hope_ext").rglob("*.py")}
    python |= {str(p.relative_to(root / "python")) for p in (root / "python/hope").rglob("*.py")}
    native = {f"hope_ext/{Path(_load.extension.__file__).name}", "hope_ext/build_report.json"}
    assert shipped == python | native | {"hope_ext/py.typed", "hope/py.typed"}
    major, minor = torch.__version__.split(".")[:2]
    assert f"Requires-Dist: torch=={major}.{minor}.*" in metadata


def test_the_source_distribution_can_be_built_from(root, tmp_path):
    script = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", script, tmp_path, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(p.relative_to(root)) for p in (root / "csrc").rglob("*") if p.is_file()}
    assert native | {"build_config.py", "build_report.py", "setup.py", "LICENSE"} <= files


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_cmake_compiles_what_pip_compiles(root, tmp_path):
    """Both doors: the same sources, each with the flags of build_config.py."""
    environment = {**os.environ, "HOPE_CUDA": "0" if BUILD["cuda"] is None else "1"}
    python = f"-DPython_EXECUTABLE={sys.executable}"
    done = run("cmake", "-S", root, "-B", tmp_path, "-G", "Ninja", python, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "compile_commands.json").read_text()
    build = build_config.configure(tmp_path)
    for source in build.sources:
        assert f'"file": "{root / source}"' in commands
    for flag in build.cxx_flags + (build.nvcc_flags if build.cuda else ()):
        assert flag.split(",")[0] in commands, flag
