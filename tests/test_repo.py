"""The architecture as tests: who may use whom, what an operator consists of, what the tree holds.

docs/design.md says why.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import build_config
import hope_ext
from hope_ext import testing

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# Folders of csrc that are no operator: what all share, and the instructions' self-tests.
NOT_STEMS = {"common", "selftest"}
STEMS = sorted({path.name for path in CSRC.iterdir() if path.is_dir()} - NOT_STEMS)
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
KERNELS = [path for path in NATIVE if path.name.endswith(("_cpu.cpp", "_cuda.cu"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- Python's layers -----------------------------------------------------------------------------


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports: "torch.nn", "hope_ext._load"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign(path: Path, *allowed: str) -> list[str]:
    """The imports of a file that are neither Python's own nor among the allowed prefixes."""
    return [
        used
        for used in imports(path)
        if used.split(".")[0] not in sys.stdlib_module_names
        and not any((used + ".").startswith(prefix + ".") for prefix in allowed)
    ]


HELPERS = [f"hope_ext.{path.stem}" for path in (ROOT / "hope_ext").glob("_[a-z]*.py")]


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_imports_torch_the_helpers_and_its_own_definition(stem):
    allowed = ("torch", *HELPERS, f"hope_ext.reference.{stem}")
    assert foreign(ROOT / f"hope_ext/{stem}.py", *allowed) == []


def test_helpers_import_torch_and_helpers():
    for path in (ROOT / "hope_ext").glob("_[a-z]*.py"):
        assert foreign(path, "torch", *HELPERS) == [], name(path)


def test_definitions_import_torch_alone():
    for path in (ROOT / "hope_ext/reference").glob("*.py"):
        assert foreign(path, "torch") == [], name(path)


def test_operators_hold_no_modules():
    for path in (ROOT / "hope_ext").rglob("*.py"):
        assert not re.search(r"\bnn\.Module\b", path.read_text()), name(path)


def test_hope_uses_public_names_of_hope_ext_alone():
    for path in (ROOT / "python/hope").rglob("*.py"):
        tree = ast.parse(path.read_text())
        used = {i.split(".")[1] for i in imports(path) if i.startswith("hope_ext.")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "hope_ext":
                    used.add(node.attr)
                dotted = f"{node.value.id}.{node.attr}"
                assert dotted != "torch.ops", f"{name(path)}:{node.lineno}: torch.ops"
        assert used <= set(hope_ext.__all__), f"{name(path)}: {used - set(hope_ext.__all__)}"


# ---- C++'s layers --------------------------------------------------------------------------------


def code(path: Path) -> str:
    """A C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)', code(path), re.MULTILINE)


def torch_headers(path: Path) -> list[str]:
    return [h for h in includes(path) if re.match(r"(torch|ATen|c10|caffe2|pybind11)/", h)]


def reached(path: Path) -> set[Path]:
    """A native file and our own headers that it includes, at any remove."""
    seen, todo = set(), [path]
    while todo:
        file = todo.pop()
        seen.add(file)
        todo += [CSRC / h for h in includes(file) if (CSRC / h).exists() and CSRC / h not in seen]
    return seen


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_kernels_are_free_of_torch(kernel):
    assert {
        name(file): torch_headers(file) for file in reached(kernel) if torch_headers(file)
    } == {}


def test_host_code_includes_small_headers_of_torch():
    heavy = {"torch/extension.h", "torch/all.h", "torch/torch.h", "torch/types.h", "ATen/ATen.h"}
    for path in NATIVE:
        assert not heavy & set(includes(path)), name(path)


def test_module_includes_the_library_and_pybind11_alone():
    headers = torch_headers(CSRC / "module.cpp")
    assert [h for h in headers if not h.startswith("pybind11/")] == ["torch/library.h"]
    others = [name(p) for p in NATIVE if any(h.startswith("pybind11/") for h in includes(p))]
    assert others == ["csrc/module.cpp"]


def test_no_stem_includes_another():
    for path in NATIVE:
        own = {"common", path.parent.name}
        for header in includes(path):
            if path.parent != CSRC and (CSRC / header).exists():
                assert header.split("/")[0] in own, f"{name(path)} includes {header}"


def test_inline_assembly_is_in_the_primitives():
    for path in NATIVE:
        if re.search(r"\b(asm|__asm__)\b", code(path)):
            assert re.fullmatch(r"csrc/common/primitives\w*\.cuh", name(path)), name(path)


def test_kernels_are_launched_by_launch():
    assert [name(path) for path in NATIVE if "<<<" in code(path)] == []


# ---- an operator's parts -------------------------------------------------------------------------


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "part",
    [
        "hope_ext/{0}.py",
        "hope_ext/reference/{0}.py",
        "csrc/{0}/{0}.h",
        "csrc/{0}/{0}.cpp",
        "tests/test_{0}.py",
        "docs/ops/{0}.md",
    ],
)
def test_an_operator_has_all_its_files(stem, part):
    assert (ROOT / part.format(stem)).is_file()


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_has_a_cpu_kernel(stem):
    assert list((CSRC / stem).glob("*_cpu.cpp"))


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_has_cases(stem):
    assert [case for case in testing.CASES if case.stem == stem]


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_has_schemas(stem):
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("hope::")]
    assert [schema for schema in schemas if schema.startswith(f"hope::{stem}")], schemas


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_is_in_the_documents(stem):
    assert re.search(rf"^\|.*docs/ops/{stem}\.md.*\|", read("README.md"), re.MULTILINE), (
        f"README.md's table of operators has no row that links docs/ops/{stem}.md"
    )
    assert re.search(rf"\b{stem}(_\w+)?\b", read("CHANGELOG.md")), f"CHANGELOG.md: no {stem}"


def test_there_is_no_part_without_its_operator():
    parts = {p.stem for p in (ROOT / "hope_ext/reference").glob("[a-z]*.py")}
    parts |= {p.stem for p in (ROOT / "docs/ops").glob("*.md")}
    parts |= {case.stem for case in testing.CASES}
    assert parts == set(STEMS)


# ---- the tree ------------------------------------------------------------------------------------


def read(path: str) -> str:
    assert (ROOT / path).is_file(), f"{path} is missing"
    return (ROOT / path).read_text()


def git(*arguments: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def texts() -> Iterator[tuple[str, str]]:
    """The project's text files, also those that are not committed yet."""
    for file in git("ls-files", "--cached", "--others", "--exclude-standard"):
        content = (ROOT / file).read_bytes() if (ROOT / file).is_file() else b""
        if b"\0" not in content:
            yield file, content.decode()


def test_no_file_holds_two_ideas():
    data = (".json", ".jsonl", ".csv", ".txt", ".svg")
    long = {
        file: lines
        for file, text in texts()
        if not file.endswith(data) and (lines := text.count("\n")) > 500
    }
    assert long == {}, "over 500 lines"


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w.}-])/(?:work|home|root|Users)/")
    found = [
        f"{file}:{number}"
        for file, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def test_nothing_generated_is_committed():
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
    generated = (".so", ".o", ".a", ".pyc", ".ptx", ".cubin", ".whl", ".safetensors", ".pt", ".log")
    assert [file for file in git("ls-files") if file.endswith(generated)] == []


def test_tools_are_pinned_once():
    """pre-commit runs the versions that `make lint` runs."""
    pinned = set(build_config.requirements(["dev"]))
    hooks = re.findall(r"additional_dependencies: \[([^\]]+)\]", read(".pre-commit-config.yaml"))
    assert pinned == set(hooks)
    assert all("==" in tool for tool in pinned)


# ---- the README's commands -----------------------------------------------------------------------

CI = "CI runs it"
# What the README may tell a reader to type: a pattern, and the test that runs it ("file::test").
COMMANDS = {
    r"git clone \S+|cd \S+|source \S+/bin/activate|python3? -m venv \S+": CI,  # the checkout
    r"(sudo )?apt install [\w+ -]+": CI,  # the machine
    r"make test( HOPE_CUDA=0| PYTHON=\S+| VENV=\S+)*": CI,
    r"make (train|bench|profile)\b.*": "tests/test_build.py::test_make_runs",
    r"make( help)?": "tests/test_build.py::test_make_runs",
    r"make gpu\b.*": "tests/test_gpu_command.py::test_make_gpu",
    r"(\.venv/bin/)?python -m benchmarks\.status": "tests/test_gpu_command.py::test_status",
    r"make (lint|format|clean)": "tests/test_build.py::test_make_runs",
    r"pip install( -e)? \.(\[\w+\])?( --no-build-isolation)?( --no-deps)?": (
        "tests/test_build.py::test_the_wheel_ships_what_runs_and_nothing_else"
    ),
    r"cmake -B build/cmake .*": "tests/test_build.py::test_cmake_compiles_what_pip_compiles",
    r"ninja -C build/cmake": "tests/test_build.py::test_cmake_compiles_what_pip_compiles",
    r"(\.venv/bin/)?hope (train|generate|info)\b.*": "tests/test_hope_cli.py::test_",
    r"(\.venv/bin/)?hope learn\b.*": (
        "tests/test_hope_learn_run.py::test_learn_reports_and_leaves_an_ordinary_checkpoint"
    ),
    r"(\.venv/bin/)?hope export\b.*": (
        "tests/test_hope_checkpoint.py::test_export_copies_a_model_that_loads"
    ),
    r"(\.venv/bin/)?hope compare\b.*": (
        "tests/test_hope_compare.py::test_compare_trains_presets_side_by_side"
    ),
    r"(\.venv/bin/)?hope evaluate\b.*": (
        "tests/test_hope_evaluate.py::test_evaluate_trains_judges_and_writes"
    ),
    r"(\.venv/bin/)?python -m benchmarks\.\w+\b.*": "tests/test_benchmarks.py::test_",
    r"(\.venv/bin/)?python -m pytest\b.*": CI,
}


def readme_commands() -> list[str]:
    """The commands of the README's bash blocks: continued lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_of_the_readme_is_tested():
    commands = readme_commands()
    assert commands, "README.md has no bash block"
    for command in commands:
        # Variables in front are the shell's: HOPE_REFERENCE=1 python ...
        bare = re.sub(r"^(\w+=\S+ )+", "", command)
        assert any(re.fullmatch(pattern, bare) for pattern in COMMANDS), (
            f"README.md says `{command}`, which COMMANDS of this file does not know: "
            "add it there with the test that runs it"
        )


@pytest.mark.parametrize("evidence", sorted(set(COMMANDS.values()) - {CI}))
def test_the_tests_that_run_the_readmes_commands_exist(evidence):
    file, _, test = evidence.partition("::")
    assert f"def {test}" in read(file), evidence


def test_the_readme_shows_the_two_commands():
    assert {"make train", "make test"} <= set(readme_commands())
    assert "make test" in read(".ci/run")
