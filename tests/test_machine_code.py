"""The kernels' machine code: registers, tensor cores, and which architectures have it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from missing import missing

import build_config
import build_report
import hope_ext
from hope_ext import _load

cuda_build = pytest.mark.skipif(
    hope_ext.build_info()["cuda"] is None, reason="this build has no CUDA kernels"
)


@cuda_build
def test_no_kernel_spills():
    spilling = [row for row in hope_ext.kernel_report() if row["spill_bytes"]]
    assert not spilling, spilling


@pytest.fixture(scope="module")
def dump() -> Callable[..., Iterator[str]]:
    """What cuobjdump prints of the extension, line by line."""
    found = shutil.which("cuobjdump")
    try:
        import triton

        found = str(next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")))
    except (ImportError, StopIteration):
        pass
    if not found:
        missing("no cuobjdump: neither a CUDA toolkit nor triton is installed")

    def lines(*options: str) -> Iterator[str]:
        command = [found, *options, _load.extension.__file__]
        said = subprocess.DEVNULL  # it has a word for each source that has not the function
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as run:
            yield from run.stdout
        assert run.returncode == 0

    return lines


@cuda_build
def test_kernel_report_agrees_with_the_binary(dump):
    kernels, architecture = set(), ""
    for line in dump("-symbols"):
        if line.startswith("arch = sm_"):
            architecture = build_report.dotted(line.removeprefix("arch = sm_").strip())
        elif "STO_ENTRY" in line:
            kernels.add((line.split()[-1], architecture))
    rows = _load.build_report()["kernels"]
    assert {(row["symbol"], row["architecture"]) for row in rows} == kernels


# The kernels whose products have to run on tensor cores; all others have none.
TENSOR_CORE_KERNELS = {
    "mma_kernel",
    "titans_linear_fwd_kernel",
    "titans_linear_states_kernel",
    "titans_linear_gradients_kernel",
    "titans_linear_tokens_kernel",
    "titans_network_fwd_kernel",
    "titans_network_bwd_kernel",
    "selfmod_fwd_kernel",
    "selfmod_bwd_kernel",
    "cms_product_kernel",
    "newton_schulz_product_kernel",
}
MMA = {"float": "TF32", "__nv_bfloat16": "BF16", "__half": "F32"}  # how SASS names the operands


@cuda_build
def test_products_are_on_tensor_cores(dump):
    """In the machine code, and of the kernel's own dtype; in one instance of each dtype, and of the
    newest architecture, since an instance has the same `mma.sync` as the others, ptxas has one
    translation of it, and to print half a gigabyte takes most of a minute."""
    rows = _load.build_report()["kernels"]
    newest = max(
        (row["architecture"] for row in rows), key=lambda a: int(a.rstrip("af").replace(".", ""))
    )
    chosen = {}
    for kernel in rows:
        if kernel["architecture"] == newest:
            plain_name = kernel["name"].replace("(anonymous namespace)::", "")
            chosen[re.search(r"(\w+)(?:<([^,>]*)[^>]*>)?\(", plain_name).groups()] = kernel
    symbols = ",".join(kernel["symbol"] for kernel in chosen.values())
    products, using = {}, set()
    for line in dump("-sass", "-arch", f"sm_{newest.replace('.', '')}", "-fun", symbols):
        if "Function : " in line:
            products[line.split()[-1]] = of_kernel = set()
        elif "MMA" in line:
            of_kernel.update(re.findall(r"\b[HIQ]G?MMA[.\w]*", line))
    for (name, dtype), kernel in chosen.items():
        found = products[kernel["symbol"]]
        assert bool(found) == (name in TENSOR_CORE_KERNELS), kernel
        if found:
            using.add(name)
        if found and dtype in MMA:
            assert all(MMA[dtype] in product.split(".") for product in found), (kernel, found)
    assert using == TENSOR_CORE_KERNELS


@cuda_build
def test_the_oldest_architecture_has_all_primitives(root, tmp_path):
    """CI builds for a newer one. The self-tests use every primitive, and PTX is nowhere else."""
    build, oldest = build_config.configure(tmp_path), build_config.ARCHITECTURES[0].replace(".", "")
    flags = [flag for flag in build.nvcc_flags if not flag.startswith("-gencode")]
    includes = [f"-I{folder}" for folder in build.include_dirs]
    source, output = root / "csrc/selftest/selftest_cuda.cu", tmp_path / "selftest.o"
    nvcc = [build.cuda_home / "bin/nvcc", *flags, *includes, f"-arch=sm_{oldest}"]
    done = subprocess.run(
        [*map(str, nvcc), "-c", source, "-o", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@cuda_build
def test_primitives_on_the_gpu():
    assert [failure for failure in _load.extension.run_selftests() if failure[1]] == []
