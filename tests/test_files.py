"""Files are written whole or not at all, and never over their own input."""

import errno

import pytest

from rwkv_rlhf.files import atomic_write, check_writable, file_hash, refuse_same_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """A run that dies while saving must not take the last good file with it."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_is_one_sentence(tmp_path):
    """The message says what happened instead of a traceback."""
    with pytest.raises(ValueError, match="disk is full"), atomic_write(tmp_path / "a") as file:
        file.write(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file in the place of the folder, or a folder in the place of the file: one sentence before any work."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out\.save: cannot be written"):
        check_writable(tmp_path / "file" / "out.save")
    with pytest.raises(ValueError, match="it is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "out.save")
    assert list((tmp_path / "new").iterdir()) == []


def test_input_is_never_the_output(tmp_path):
    """Also not by another spelling of the same path."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in (tmp_path / "a", tmp_path / "." / "a", tmp_path / "link"):
        with pytest.raises(ValueError, match="--output_csv"):
            refuse_same_file(tmp_path / "a", other, "--output_csv")
    refuse_same_file(tmp_path / "a", tmp_path / "b", "--output_csv")
    assert file_hash(tmp_path / "a") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
