"""The CUDA primitives on the emulator, and its detectors on kernels with a known mistake."""

import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from emulator import build
from missing import missing

SANITIZED = ("address", "races")
SELFTEST = (build.HERE / "selftest_main.cpp", build.ROOT / "csrc/selftest/selftest_cuda.cu")
BROKEN = build.HERE / "broken_kernels.cu"
BROKEN_LINES = {
    match[1]: number
    for number, line in enumerate(BROKEN.read_text().splitlines(), 1)
    if (match := re.search(r"// <- (\w+)$", line))
}


@pytest.fixture(autouse=True, scope="module")
def cuda_headers():
    """Without them there is nothing to emulate, which only a build without CUDA excuses."""
    try:
        build.cuda_include()
    except build.Unavailable as reason:
        if torch.version.cuda is None or os.environ.get("HOPE_CUDA") == "0":
            pytest.skip(str(reason))
        raise


def available(variant):
    try:
        build.require(variant)
    except build.Unavailable as reason:
        missing(reason)
    return variant


@pytest.fixture(params=build.VARIANTS)
def variant(request):
    return available(request.param)


# ---- the primitives ----------------------------------------------------------------------------


def failures(run):
    """The self-tests that did not print ok."""
    results = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert "mma bf16" in results, run.stdout
    failed = [name for name, result in results.items() if result != "ok"]
    assert run.returncode == len(failed), run.stdout
    return failed


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_selftests(variant, seed):
    assert failures(build.run([build.build(SELFTEST, variant)], variant, seed=seed)) == []


def test_selftests_notice_a_wrong_instruction(tmp_path):
    source = SELFTEST[1].read_text()
    for right, wrong in {
        "mma_fp16(sum, fragment_a, fragment_b)": "mma_bf16(sum, fragment_a, fragment_b)",
        "transpose_8x8(in[threadIdx.x])": "in[threadIdx.x]",
    }.items():
        assert right in source
        source = source.replace(right, wrong)
    path = tmp_path / "selftest_cuda.cu"
    path.write_text(source)
    run = build.run([build.build([SELFTEST[0], path])])
    assert failures(run) == ["movmatrix", "mma fp16"]
    assert "movmatrix: element 0: expected " in run.stdout


def test_blocks_on_several_threads(variant):
    command = [build.build([BROKEN], variant), "missing_barrier", "intact"]
    run = build.run(command, variant, extra={"EMULATOR_THREADS": "2"})
    assert run.returncode == 0, run.stdout


def test_shared_object_in_a_process_with_torch(variant):
    """As the kernels behind torch's operators run: in any thread, between torch's own work."""
    library = build.build(SELFTEST, variant, shared=True)
    script = textwrap.dedent(
        """
        import ctypes, sys, threading, torch
        a = torch.randn(64, 64)
        before = a @ a
        library = ctypes.CDLL(sys.argv[1])
        results = [library.print_selftests()]
        threads = [threading.Thread(target=lambda: results.append(library.print_selftests()))
                   for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert results == [0, 0, 0], results
        assert torch.equal(a @ a, before)
        """
    )
    run = build.run([sys.executable, "-c", script, library], variant, preload=True)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("mma bf16: ok") == 3


# ---- the detectors -----------------------------------------------------------------------------

LINE = "{file}:{line}"  # of the mistake's mark in broken_kernels.cu
FOUND = [  # (mistake, variant, what the report contains)
    ("missing_barrier", "races", ["ThreadSanitizer: data race", LINE]),
    ("missing_barrier", "plain", ["wrong result"]),
    ("missing_syncwarp", "races", ["ThreadSanitizer: data race", LINE]),
    ("missing_copy_wait", "plain", ["ends without waiting for an asynchronous copy", LINE]),
    ("late_copy_wait", "races", ["ThreadSanitizer: data race", LINE]),
    ("late_copy_wait", "plain", ["wrong result", "nan"]),
    ("divergent_barrier", "plain", ["divergent barrier", LINE]),
    ("early_return", "plain", ["deadlock", "__syncthreads", "63 of 64 threads came", LINE]),
    ("divergent_warp", "plain", ["deadlock", "__shfl_xor_sync", LINE]),
    ("shared_overrun", "address", ["AddressSanitizer", LINE]),
    ("static_shared_overrun", "address", ["AddressSanitizer", LINE]),
    ("between_arrays", "address", ["AddressSanitizer: use-after-poison", LINE]),
    ("global_overrun", "address", ["AddressSanitizer: heap-buffer-overflow", LINE]),
    ("misaligned", "address", ["misaligned address", LINE]),
    ("misaligned_copy", "plain", ["cp.async: address", "is not a multiple of 16", LINE]),
    ("assumed_shared", "address", ["is not in shared memory", LINE]),
    ("uninitialised_shared", "plain", ["wrong result", "nan"]),
    ("blocks_collide", "races", ["ThreadSanitizer: data race", LINE]),
    ("nested_launch", "plain", ["launch: called by a kernel"]),
    ("empty_grid", "plain", ["launch: a grid of (0,1,1) blocks"]),
    ("oversized_block", "plain", ["launch: a block of (1056,1,1) threads"]),
    ("oversized_shared", "plain", ["launch: 262144 bytes of shared memory"]),
]


@pytest.mark.parametrize(
    ("mistake", "variant", "report"), FOUND, ids=[f"{m}-{v}" for m, v, _ in FOUND]
)
def test_mistake_is_found(mistake, variant, report):
    program = build.build([BROKEN], available(variant))
    where = {"file": BROKEN, "line": BROKEN_LINES.get(mistake, "unmarked")}
    for seed in (1, 2, 3):
        run = build.run([program, mistake, "broken"], variant, seed=seed)
        assert run.returncode != 0, f"seed {seed}: not noticed"
        for part in report:
            assert part.format(**where) in run.stdout, f"seed {seed}:\n{run.stdout}"


def test_uninitialised_register_is_found():
    if not build.supports("-ftrivial-auto-var-init=pattern"):
        pytest.skip("the compiler has no -ftrivial-auto-var-init: registers start as they are")
    run = build.run([build.build([BROKEN]), "uninitialised_register", "broken"])
    assert "wrong result" in run.stdout
    warning = f"{BROKEN}:{BROKEN_LINES['uninitialised_register']}:"
    assert re.search(re.escape(warning) + r".*uninitialized", build.warnings(BROKEN))


@pytest.mark.parametrize("variant", ["plain", *SANITIZED])
def test_no_false_alarm(variant):
    program = build.build([BROKEN], available(variant))
    for mistake in sorted({mistake for mistake, _, _ in FOUND} | {"uninitialised_register"}):
        for seed in (0, 1, 2):
            run = build.run([program, mistake, "intact"], variant, seed=seed)
            assert run.returncode == 0, f"{mistake}, seed {seed}:\n{run.stdout}"


# ---- the build helper --------------------------------------------------------------------------


def test_raw_shared_memory_does_not_compile(tmp_path):
    source = tmp_path / "raw.cu"
    source.write_text('#include "common/primitives.cuh"\nvoid f() { __shared__ float x[4]; }\n')
    with pytest.raises(build.CompileError, match="use_SHARED_ARRAY_instead_of___shared__"):
        build.build([source])


def test_builds_are_kept_until_a_source_changes(tmp_path):
    source = tmp_path / "program.cpp"
    source.write_text("int main() { return 3; }\n")
    first = build.compile_object(source)
    written = first.stat().st_mtime_ns
    assert build.compile_object(source) == first
    assert first.stat().st_mtime_ns == written
    source.write_text("int main() { return 4; }\n")
    changed = build.compile_object(source)
    assert changed != first
    for made in (first, changed):
        made.unlink()
        made.with_suffix(".o.log").unlink()


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"variant: expected one of plain, .* got 'fast'"):
        build.require("fast")


def test_missing_headers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(build, "SYSTEM_CUDA", Path(tmp_path, "none"))
    with pytest.raises(
        build.Unavailable, match=r"needs the CUDA headers.*nvidia-cuda-runtime.*nv/target"
    ):
        build.cuda_include.__wrapped__()
