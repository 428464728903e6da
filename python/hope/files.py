"""Writing files so that a kill at any moment leaves the old content or the new, never a part."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = ".partial-"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there replaces `path` when the block ends well."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_directory(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """The same for a new directory; `path` must not exist, or be empty.

    What a killed process left is removed: all of it beside `path`, or, where this process is not
    `alone` to write there, what was to be `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_TEMPORARY}{path.name}-"
    for leftover in path.parent.glob((_TEMPORARY if alone else glob.escape(prefix)) + "*"):
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Asks the system to bring a file, or a directory's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
