"""Files are written whole or not at all, and never over their own input."""

import errno
import hashlib
import os
import signal

import pytest

from rwkv_rlhf.files import (
    AppendLog,
    Lines,
    OtherHead,
    Sized,
    atomic_write,
    check_writable,
    file_hash,
    fingerprint,
    refuse_same_file,
    same_fingerprint,
)
from tests.support.processes import PROGRAMS, started


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


def test_a_fingerprint_tells_files_apart(tmp_path):
    """By size and by every byte; a corpus by its two files; what is no file by its name."""
    path = tmp_path / "corpus"
    assert fingerprint("") == "" and fingerprint("world") == "world"
    (tmp_path / "corpus.bin").write_bytes(bytes(33 << 20))
    one = fingerprint(path)
    (tmp_path / "corpus.idx").write_bytes(b"index")
    ends = f"5 bytes, {hashlib.sha256(b'indexindex').hexdigest()[:16]}"  # both ends of a small file are all of it
    blocks = hashlib.sha256(hashlib.sha256(b"index").digest()).hexdigest()[:32]
    two = fingerprint(str(path))
    assert one.startswith("34603008 bytes, ") and two == f"{one}; {ends}, {blocks}"
    older = f"{one.rsplit(', ', 1)[0]}; {ends}"
    assert same_fingerprint(two, older) and same_fingerprint(older, two) and not same_fingerprint(one, older)
    for at in (0, 3 << 20, 17 << 20, (33 << 20) - 1):
        with open(tmp_path / "corpus.bin", "r+b") as file:
            file.seek(at)
            file.write(b"x")
        assert not same_fingerprint(fingerprint(path), two)
        two = fingerprint(path)


RECORDS = {
    "lines": (Lines(), [b"one\n", b"\n", b'"three\n', b"4\n"]),
    "CSV": (Lines(quoted=True), [b"a,b\n", b'"two\nlines","quoted ""\n"""\n', b"3,4\n"]),
    "sized": (Sized(b"TEST"), [b"one", b"", bytes(range(256)) * 3, b"TEST"]),
}


def written(path, framing, records, head):
    log = AppendLog(path, framing, head)
    log.begin()
    log.append(records[0])
    log.append(*records[1:])
    return path.read_bytes()


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("head", [b"", b"the key\n"])
def test_a_log_cut_anywhere_goes_on(tmp_path, kind, head):
    """Wherever a kill cuts it: the records before are there and no others, and the end is that of an unbroken run."""
    framing, records = RECORDS[kind]
    path = tmp_path / "log"
    whole = written(path, framing, records, head)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        log = AppendLog(path, framing, head)
        if not log.resume():
            assert size < len(head)
            log.begin()
        found = list(log.records())
        assert found == records[: len(found)]
        cut = log.keep()
        assert len(framing.pack(records[len(found)])) > cut
        log.append(*records[len(found) :])
        assert path.read_bytes() == whole, size


def test_a_damaged_record_ends_the_log(tmp_path):
    """A byte that changed on the disk must not become a teacher's logit; and no room is made for a size that lies."""
    framing, records = RECORDS["sized"]
    path = tmp_path / "log"
    whole = written(path, framing, records, b"")
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        found = list(AppendLog(path, framing).records())
        assert found == records[: len(found)] and len(found) < len(records)


def test_a_log_keeps_what_is_of_use(tmp_path):
    """A whole record may still be of no use to its reader: it goes, and all behind it."""
    framing, records = RECORDS["lines"]
    path = tmp_path / "log"
    whole = written(path, framing, records, b"key\n")
    log = AppendLog(path, framing, b"key\n")
    assert log.resume() and len(list(log.records())) == 4 and log.keep(4) == 0
    assert log.keep(2) == len(b"".join(records[2:])) and path.read_bytes() == whole[: -len(b"".join(records[2:]))]
    log.remove()
    assert not path.exists() and not log.resume()


def test_a_log_of_other_work_is_left_alone(tmp_path):
    """Whoever opens it decides; a first line that a kill cut off is begun anew."""
    path = tmp_path / "log"
    written(path, Lines(), [b"x\n"], b"key one\n")
    with pytest.raises(OtherHead) as caught:
        AppendLog(path, Lines(), b"key two\n").resume()
    assert caught.value.head == b"key one\n" and path.read_bytes() == b"key one\nx\n"
    path.write_bytes(b"key t")
    assert not AppendLog(path, Lines(), b"key two\n").resume()
    with pytest.raises(OtherHead):
        AppendLog(path, Lines(), b"key one\n").resume()


def test_a_full_disk_ends_a_log_in_one_sentence(tmp_path):
    """And what was there stays; /dev/full is a disk without room."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="the disk is full; free some space and start again"):
        AppendLog(tmp_path / "log", Lines()).append(b"x\n")


def test_a_killed_process_leaves_whole_records(tmp_path):
    """What `append` returned from is on the disk, whatever comes next."""
    assert started(PROGRAMS / "killed_log.py", tmp_path / "log", fresh=True).wait(timeout=60) == -signal.SIGKILL
    log = AppendLog(tmp_path / "log", Sized(b"TEST"), b"key\n")
    assert log.resume() and list(log.records()) == [b"0", b"1", b"2"]
