"""What a resumed run must share with the one that was stopped. What each flag is to it is frozen in tests/flags.txt."""

import dataclasses

import pytest

from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.field import OnResume, setting
from rwkv_rlhf.training import run_identity
from rwkv_rlhf.training.run_identity import differences, identity


def made(*words):
    """The identity of a run with these words."""
    return identity(parse(["--doctor", "1", *map(str, words)]))


@pytest.fixture
def toy(monkeypatch):
    """toy(value, resume) is the identity of a run of a program that has one more setting, `toy`."""

    def with_value(value, **about):
        fields = [("toy", int, setting(3, "a setting that an addition brings along", **about))]
        extended = dataclasses.make_dataclass("Extended", fields, bases=(Config,), frozen=True)
        named = {field.name: field for field in dataclasses.fields(extended) if "help" in field.metadata}
        monkeypatch.setattr(run_identity, "settings", lambda: named)
        return identity(extended(toy=value))

    return with_value


def test_a_new_setting_counts_unless_it_says_otherwise(toy):
    """If this breaks, a flag that an addition brings along may change in the middle of a run without a word."""
    one, two = toy(3), toy(4)
    assert differences(one, two) == (["{toy} was 3, is 4"], [])
    older = {name: value for name, value in one.items() if name != "toy"}
    assert differences(older, one) == ([], []) and differences(older, two)[0]  # a point of before has the default
    assert differences(toy(3, resume=OnResume.ROUNDS), toy(4, resume=OnResume.ROUNDS)) == ([], ["{toy}"])
    assert "toy" not in toy(4, resume=OnResume.MAY_CHANGE)


@pytest.mark.parametrize(("bptt", "same"), [("exact", True), ("truncated", False)])
def test_chunks_round_only_with_the_exact_gradient(bptt, same):
    """If this breaks, a run may go on with another gradient, or may not with chunks that fit another card."""
    one, two = (made("--infctx", 1, "--chunk_ctx", chunk, "--bptt", bptt) for chunk in (8, 16))
    assert differences(one, two) == (([], ["{chunk_ctx}"]) if same else (["{chunk_ctx} was 8, is 16"], []))


def test_files_count_by_their_content(tmp_path):
    """If this breaks, moved data cannot be gone on with, or other data under the same name is trained on."""
    here, there = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    here.write_text('{"text": "one"}\n')
    there.write_text(here.read_text())
    was = made("--data_file", here)
    assert differences(was, made("--data_file", there)) == ([], [])
    here.write_text('{"text": "two"}\n')
    assert differences(was, made("--data_file", here)) == (["{data_file} is another file"], [])
    here.write_text('{"text": "some words"}\n' * 200_000)
    was = made("--data_file", here)
    with open(here, "r+b") as file:  # as long as before, the first and the last megabyte as before
        file.seek(2 << 20)
        file.write(b"#")
    assert differences(was, made("--data_file", here)) == (["{data_file} is another file"], [])


def test_what_is_only_looked_at_does_not_count(tmp_path):
    """If this breaks, a run cannot go on with other held-out data, or stops early by two different measures."""
    other = tmp_path / "val.jsonl"
    other.write_text('{"text": "one"}\n')
    assert differences(made(), made("--val_file", other, "--proj_dir", tmp_path, "--grad_cp", 0)) == ([], [])
    was, now = made("--early_stop", 2), made("--early_stop", 2, "--val_file", other)
    assert differences(was, now) == (["{val_file} is another file"], [])
    assert differences(made("--strategy", "auto"), made("--strategy", "ddp")) == ([], [])
