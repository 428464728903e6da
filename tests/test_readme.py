"""The documents hold: their Python runs, their links lead somewhere, the files they name exist.

That the README's commands are run by tests is checked in test_repo.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, with the number of their first line."""
    text = document.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def anchors(document: Path) -> set[str]:
    """The names of a document's headings, as links write them."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_python_runs(document):
    """A page's blocks one after the other, in one namespace, as a reader would run them."""
    namespace: dict[str, object] = {}
    for lines_before, code in blocks(document, "python"):
        exec(compile("\n" * lines_before + code, str(document), "exec"), namespace)


def test_the_readme_shows_the_operator():
    assert any("hope_ext.titans_memory(" in code for _, code in blocks(DOCUMENTS[0], "python"))


@every_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_document
def test_named_files_exist(document):
    """Paths such as `csrc/titans/titans.h`; where a glob is meant, it has to match something."""
    folders = "csrc|hope_ext|python|tests|benchmarks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]*)`", document.read_text()):
        assert list(ROOT.glob(path.rstrip("/"))), path
