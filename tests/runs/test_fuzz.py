"""The fuzz suite: a share of its inputs, and whether it sees what it must. tests/fuzz.py reads many more."""

import os
import signal
import time
from random import Random

import pytest

from tests import fuzz
from tests.fuzzing import readers
from tests.fuzzing.words import TYPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EACH = 8  # inputs of a reader: 500 in all


def test_whole_samples_are_read():
    """If this breaks, a reader refuses what is in order, and damaged copies of it prove nothing."""
    for name, reader in readers.READERS.items():
        result = fuzz.Result()
        fuzz.batch(name, [-1], result, fuzz.sample(reader))
        refused = name in TYPED and not result.defects  # what is typed there is odd by intention
        assert result.read[name] == 1 or refused, (name, result.defects)


def test_damaged_files_end_in_a_value_or_one_sentence():
    """If this breaks, a file that somebody downloaded crashes, hangs or fills the program, or runs code in it."""
    result = fuzz.fuzz(list(readers.READERS), EACH * len(readers.READERS), 0)
    assert not result.defects, "\n".join(map(str, result.defects))
    assert sum(result.read.values()) + sum(result.refused.values()) >= 500


def read_badly(path, rng):
    """Misbehaves as the sample says."""
    what = path.read_text()
    if what == "hang":
        time.sleep(60)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "run":
        os.system("true")
    elif what == "write":
        path.write_text("other")
    elif what == "fill":
        return b"x" * (1 << 30)  # far above the limit: what the kernel reclaims meanwhile hides some of it
    elif what == "leave":
        raise ValueError("something is wrong")
    raise KeyError(what)


@pytest.mark.parametrize("what", ["hang", "crash", "run", "write", "fill", "leave", "raise"])
def test_the_judge_sees_what_it_must(monkeypatch, what):
    """If this breaks, the fuzz suite says that all is well whatever happens."""
    said = {"hang": "took more than", "crash": "status -11", "run": "os.system", "fill": "MiB", "raise": "KeyError"}
    said |= {"write": "changed file.txt", "leave": "does not name the file"}

    def write(folder):
        (folder / "file.txt").write_text(what)
        return folder / "file.txt"

    def read(path, rng):
        try:
            read_badly(path, rng)
        except KeyError:
            if what == "raise":
                raise

    monkeypatch.setattr(fuzz, "SECONDS", 1 if what == "hang" else 30)
    monkeypatch.setitem(fuzz.READERS, "bad", readers.Reader(write, read))
    result = fuzz.Result()
    fuzz.batch("bad", [-1], result, fuzz.sample(fuzz.READERS["bad"]))
    (defect,) = result.defects
    assert said[what] in defect.what and "--reader 'bad'" in str(defect)


def test_an_input_is_a_function_of_its_number():
    """If this breaks, a defect that was found cannot be found again."""
    for name in ("pairs.csv", "model.pth", "text.h5", "pairs.parquet"):
        reader = readers.READERS[name]
        files, _ = fuzz.sample(reader)
        one, two = (fuzz.mutated(reader, files, Random(f"{name} 3")) for _ in range(2))
        assert [len(data) for data in one.values()] == [len(data) for data in two.values()]


def test_a_changed_file_is_another_file():
    """If this breaks, the suite reads whole files over and over and finds nothing."""
    reader = readers.READERS["text.jsonl"]
    files, target = fuzz.sample(reader)
    changed = [fuzz.mutated(reader, files, Random(number)).get(target) for number in range(50)]
    assert sum(data != files[target] for data in changed) > 35
