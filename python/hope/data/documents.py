"""Where text comes from: documents of files, data sets and Python's own source, one at a time."""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope.errors import HopeError
from hope.extras import need

VALIDATION_FRACTION = 0.05
_GLOB_CHARACTERS = "*?["
_HUB = "hf:"
_ROWS = 256  # of a table that are read at once


@dataclass(frozen=True)
class Document:
    """A text and the name that decides on which side of the split it falls."""

    name: str
    text: bytes

    @property
    def is_validation(self) -> bool:
        """Whether it is one of the about 5 % of names that a hash chooses."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64


@dataclass(frozen=True)
class _File:
    """A file and its name. named: by itself, so that it has to hold text; others are left out."""

    name: str
    path: Path
    named: bool


class Documents:
    """The documents of files, directories, globs and data sets, read one at a time.

    A text file is one document. Lines of .jsonl files (and of .json files whose first line is an
    object with the field) and rows of .parquet files and data sets are one each, their text in
    `field`. A data set is a directory of `datasets` (save_to_disk), or hf:NAME, hf:NAME:SPLIT,
    hf:NAME:CONFIG:SPLIT for its load_dataset, which may read it from the network.

    Files that are missing raise HopeError at once, what is wrong in them when it is reached.
    `description` says what was there, once all documents have been read.
    """

    def __init__(self, paths: Sequence[str], field: str = "text") -> None:
        self.field = field
        self._named = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        self._sources = _sources(paths)
        self._files = self._documents = self._skipped = self._empty = 0

    def __iter__(self) -> Iterator[Document]:
        self._files = self._documents = self._skipped = self._empty = 0
        for source in self._sources:
            before = self._documents
            for document in self._read(source):
                if document.text:
                    self._documents += 1
                    yield document
                else:
                    self._empty += 1
            self._files += self._documents > before
        if self._documents == 0:
            raise HopeError(f"no text in {self._named}: {self._why_nothing()}")

    @property
    def unit(self) -> str:
        """What a document is."""
        return "file" if self._documents == self._files else "document"

    @property
    def description(self) -> str:
        counts = [f"{self._files:,} file{'' if self._files == 1 else 's'}"]
        if self._documents != self._files:
            counts.append(f"{self._documents:,} documents")
        if self._skipped:
            counts.append(f"{self._skipped} empty or not text left out")
        if self._empty:
            counts.append(f"{self._empty:,} empty documents left out")
        return f"{self._named} ({', '.join(counts)})"

    def _why_nothing(self) -> str:
        if self._empty:
            return f"all {self._empty} documents there are empty"
        return f"all {self._skipped} files there are empty or not UTF-8 text"

    def _read(self, source: _File | str) -> Iterator[Document]:
        if isinstance(source, str):
            yield from _data_set(source, self.field)
        elif source.path.is_dir():
            yield from _saved_data_set(source.path, self.field)
        elif source.path.suffix == ".parquet":
            yield from _parquet(source, self.field)
        elif _is_lines(source.path, self.field):
            yield from _lines(source, self.field)
        elif source.named:
            yield Document(source.name, _read_text(source.path))
        else:
            text = _read(source.path)
            if text and _why_not_text(text) is None:
                yield Document(source.name, text)
            else:
                self._skipped += 1


class StandardLibrary:
    """The Python source files of the running interpreter's standard library, as `Documents`."""

    unit = "file"

    def __init__(self) -> None:
        self.root, self._files = Path(sysconfig.get_path("stdlib")), 0

    def __iter__(self) -> Iterator[Document]:
        self._files = 0
        for path in sorted(self.root.rglob("*.py")):
            relative = path.relative_to(self.root)
            if {"site-packages", "dist-packages"}.isdisjoint(relative.parts):
                text = path.read_bytes()
                # Its tests hold files in odd encodings on purpose.
                if text and _why_not_text(text) is None:
                    self._files += 1
                    yield Document(relative.as_posix(), text)
        if self._files == 0:
            raise HopeError(
                f"no source of Python's standard library in {self.root}; name files with --data"
            )

    @property
    def description(self) -> str:
        return f"Python's standard library ({self._files:,} files in {self.root})"


# ---- which files ---------------------------------------------------------------------------------


def _sources(paths: Sequence[str]) -> list[_File | str]:
    """What paths name: files and saved data sets once each, at their first place, and hf: names."""
    found: dict[Path | str, _File | str] = {}
    for given in paths:
        path = Path(given)
        if given.startswith(_HUB):
            found[given] = given
            continue
        if path.is_file() or _is_saved_data_set(path):
            files = [_File(path.name, path, named=True)]
        else:
            files = _files_in(path) if path.is_dir() else _files_matching(given)
        for file in files:
            key = file.path.resolve()
            before = found.get(key)
            named = file.named or (isinstance(before, _File) and before.named)
            found[key] = _File(file.name, file.path, named)
    return list(found.values())


def _files_in(root: Path) -> list[_File]:
    """All files below a directory with their relative names, except below hidden names."""
    relative = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    if not visible:
        raise HopeError(f"no files in the directory {root}")
    return [_File(path.as_posix(), root / path, named=False) for path in visible]


def _files_matching(pattern: str) -> list[_File]:
    if not any(character in pattern for character in _GLOB_CHARACTERS):
        raise HopeError(f"no such file or directory: {pattern}")
    names = sorted(glob.glob(pattern, recursive=True))
    files = [_File(name, Path(name), named=False) for name in names if Path(name).is_file()]
    if not files:
        raise HopeError(f"no file matches {pattern}")
    return files


# ---- text files ----------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HopeError(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> bytes:
    text = _read(path)
    if not text:
        raise HopeError(f"{path} is empty")
    reason = _why_not_text(text)
    if reason is not None:
        raise HopeError(f"{path} is not UTF-8 text ({reason})")
    return text


def _why_not_text(text: bytes) -> str | None:
    zero = text.find(0)
    if zero >= 0:
        return f"a zero byte at offset {zero}"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} at offset {error.start}"
    return None


# ---- lines, tables, data sets --------------------------------------------------------------------


def _is_lines(path: Path, field: str) -> bool:
    """Whether each line is an object: so it is in .jsonl, and in .json that begins like that."""
    if path.suffix != ".json":
        return path.suffix == ".jsonl"
    with _readable(path), path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and field in value


def _lines(file: _File, field: str) -> Iterator[Document]:
    with _readable(file.path), file.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HopeError(f"{where} is not JSON: {error}") from error
            if not isinstance(value, dict):
                raise HopeError(f"{where} must be an object with the field {field!r}")
            if field not in value:
                raise HopeError(_no_field(where, "field", field, value))
            yield Document(f"{file.name}:{number}", _bytes(value[field], where, field))


def _parquet(file: _File, field: str) -> Iterator[Document]:
    parquet = need("pyarrow.parquet", "data", f"reading {file.path}")
    with _loading(file.path):
        table = parquet.ParquetFile(file.path)
        _require_column(str(file.path), field, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=_ROWS, columns=[field])
        texts = (value.as_py() for batch in batches for value in batch.column(0))
        yield from _rows(file.name, str(file.path), field, texts)


def _is_saved_data_set(path: Path) -> bool:
    """Whether `datasets` has written the directory: a data set, or several (its splits)."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def _saved_data_set(path: Path, field: str) -> Iterator[Document]:
    library = need("datasets", "data", f"reading the data set {path}")
    with _loading(path):
        data = library.load_from_disk(str(path))
        if isinstance(data, library.DatasetDict):
            splits = ", ".join(str(path / name) for name in data)
            raise HopeError(f"{path} holds several data sets; name one of: {splits}")
        _require_column(str(path), field, data.column_names)
        texts = _column(data.select_columns([field]), field)
        yield from _rows(path.name, str(path), field, texts)


def _data_set(source: str, field: str) -> Iterator[Document]:
    name, *rest = source.removeprefix(_HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise HopeError(
            f"a data set is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, not {source!r}"
        )
    split, config = rest[-1] if rest else "train", rest[0] if len(rest) == 2 else None
    library = need("datasets", "data", f"reading the data set {source}")
    with _loading(source):
        data = library.load_dataset(name, config, split=split, streaming=True)
        if data.column_names is not None:  # else it shows in the rows
            _require_column(source, field, data.column_names)
        yield from _rows(source, source, field, _column(data, field))


def _column(data: Any, field: str) -> Iterator[Any]:
    for batch in data.iter(batch_size=_ROWS):
        yield from batch.get(field, [None])


def _rows(name: str, where: str, field: str, texts: Iterable[Any]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        yield Document(f"{name}:{number}", _bytes(text, f"{where}, row {number}", field))


@contextmanager
def _loading(what: Path | str) -> Iterator[None]:
    """Names the file or data set in whatever a library raises about it."""
    try:
        yield
    except HopeError:
        raise
    except Exception as error:  # they raise classes of their own, and of many libraries below them
        raise HopeError(f"cannot read {what}: {error}") from error


def _require_column(where: str, field: str, columns: Sequence[str]) -> None:
    if field not in columns:
        raise HopeError(_no_field(where, "column", field, columns))


def _no_field(where: str, kind: str, field: str, there: Iterable[str]) -> str:
    return f"{where} has no {kind} {field!r} (data.field); there are: {', '.join(map(repr, there))}"


def _bytes(text: Any, where: str, field: str) -> bytes:
    if not isinstance(text, str):
        raise HopeError(f"{where}: {field!r} must be text, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise HopeError(
            f"{where}: {field!r} is not text: half a character ({text[error.start]!a}) at "
            f"character {error.start}"
        ) from error
