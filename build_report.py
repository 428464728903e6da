"""What the CUDA compiler says about each kernel, kept with the build.

    python build_report.py NVCC ARGUMENTS...

runs nvcc and keeps, beside the object it makes (OBJECT.kernels.json), what ptxas printed:
registers, shared memory and spills of every kernel and architecture, with the launch bounds from
the PTX and the time it took. Both doors of the build compile through it.

    python build_report.py merge BUILD_DIR PACKAGE_DIR

makes of them the one file that ships beside the extension, and that ``hope_ext.kernel_report()``
reads on machines with and without a GPU.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build_config import DESCRIPTION, ROOT, BuildError

FILE = "build_report.json"
SIDECAR = ".kernels.json"
MAX_THREADS = (
    1024  # a block's limit on every GPU: what a kernel without launch bounds is compiled for
)


def compile_and_report(command: list[str]) -> int:
    """Run nvcc and write the report of the object it makes; returns nvcc's exit status."""
    if (
        "-c" not in command
    ):  # CMake also asks nvcc for its version, and links with it while it looks around
        return subprocess.run(command).returncode
    output = Path(command[command.index("-o") + 1])
    source = next(Path(word) for word in command if word.endswith(".cu"))
    with tempfile.TemporaryDirectory() as kept:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--keep", "--keep-dir", kept], stderr=subprocess.PIPE, text=True
        )
        seconds = round(time.perf_counter() - start, 1)
        bounds = {}
        for ptx in Path(kept).glob("*.ptx"):
            bounds.update(launch_bounds(ptx.read_text()))
    kernels, rest = parse_ptxas(done.stderr)
    sys.stderr.write(rest)
    if done.returncode == 0:
        for kernel in kernels:
            kernel["threads"] = bounds.get((kernel["symbol"], kernel["architecture"]), MAX_THREADS)
        report = {"source": str(source.resolve()), "compile_seconds": seconds, "kernels": kernels}
        Path(f"{output}{SIDECAR}").write_text(json.dumps(report))
    return done.returncode


def parse_ptxas(text: str) -> tuple[list[dict], str]:
    """The kernels that ``ptxas -v`` reports in ``text``, and the lines that are no report."""
    kernels, rest, kernel, function = [], [], {}, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            function, kernel = match[1], {"symbol": match[1], "architecture": dotted(match[2])}
            kernels.append(kernel)
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(
            r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # A function that was not inlined is reported under the kernel that calls it.
            if kernel:
                kernel["spill_bytes"] = kernel.get("spill_bytes", 0) + int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            if kernel and function == kernel["symbol"]:
                shared = re.search(r"(\d+) bytes smem", line)
                kernel.update(registers=int(match[1]), shared_bytes=int(shared[1]) if shared else 0)
        elif not re.match(r"ptxas info\s*:", line):
            rest.append(line + "\n")
    return kernels, "".join(rest)


def launch_bounds(ptx: str) -> dict[tuple[str, str], int]:
    """The largest block of each kernel of a PTX file that has ``__launch_bounds__``."""
    architecture = dotted(re.search(r"^\.target sm_(\w+)", ptx, re.MULTILINE)[1])
    bounds = {}
    for symbol, directives in re.findall(r"\.entry\s+(\w+)\s*(?:\([^)]*\))?([^{;]*)[{;]", ptx):
        if match := re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", directives):
            x, y, z = ([int(n) for n in match[1].split(",")] + [1, 1])[:3]
            bounds[symbol, architecture] = x * y * z
    return bounds


def merge(build_dir: Path, package: Path) -> None:
    """Write the report of a finished build into the package folder that holds its extension."""
    build = json.loads((build_dir / DESCRIPTION).read_text())
    reports = {}
    for sidecar in sorted(build_dir.rglob(f"*{SIDECAR}")):
        report = json.loads(sidecar.read_text())
        reports[Path(report["source"])] = report
    rows = []
    for source in filter(None, build["cuda_sources"].split(";")):
        report = reports.get(ROOT / source)
        if report is None:
            raise BuildError(
                f"{source} was compiled without its report; remove {build_dir}, rebuild"
            )
        for kernel in report["kernels"]:
            row = {"name": demangle(kernel["symbol"]), **kernel, "source": source}
            rows.append({**row, "compile_seconds": report["compile_seconds"]})
    content = {"torch": build["torch"], "cuda": build["cuda"] or None, "kernels": rows}
    (package / FILE).write_text(json.dumps(content, indent=1) + "\n")


def demangle(symbol: str) -> str:
    """A C++ symbol as it is written in the source; other names are returned as they are."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    pointer = library.__cxa_demangle(symbol.encode(), None, None, None)
    if not pointer:
        return symbol
    try:
        return ctypes.string_at(pointer).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(pointer))


def dotted(number: str) -> str:
    """ "90a" -> "9.0a"."""
    digits = number.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}{number[len(digits) :]}"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["merge"]:
        merge(Path(arguments[1]), Path(arguments[2]))
        return 0
    return compile_and_report(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
