"""Files and directories that are complete or absent, whatever happens while they are written."""

import os

import pytest
from hope.files import atomic_directory, atomic_file, remove_partial


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with path.open() as reader:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"  # the file itself is as it was: another took its name
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_directory_is_complete_or_absent(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "a" / "whole") as temporary:
            (temporary / "part").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    for left in (".partial-whole", ".partial-other"):  # by processes that were killed
        (tmp_path / "a" / left / "below").mkdir(parents=True)
    with atomic_directory(tmp_path / "a" / "whole") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "part").write_text("x")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"whole", ".partial-other"}
    remove_partial(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]
    assert [path.name for path in (tmp_path / "a" / "whole").rglob("*")] == ["below", "part"]
    assert (tmp_path / "a" / "whole").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
