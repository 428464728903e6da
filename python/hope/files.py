"""Writing files so that a kill at any moment leaves the old content or the new, never a part."""

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
    with _naming(path):
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
def atomic_directory(path: Path) -> Iterator[Path]:
    """The same for a new directory; `path` must not exist, or be empty."""
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_directory(path)
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
        temporary.mkdir()
        try:
            yield temporary
            for part in temporary.rglob("*"):
                _sync(part)
            _sync(temporary)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names `path` in an OSError of the system that names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno and (error.filename is None or _TEMPORARY in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def partial_directory(path: Path) -> Path:
    """Where `atomic_directory(path)` writes."""
    return path.with_name(_TEMPORARY + path.name)


def remove_partial(parent: Path) -> None:
    """Removes the directories that killed processes left half written in `parent`."""
    for leftover in parent.glob(_TEMPORARY + "*"):
        shutil.rmtree(leftover)


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
