"""A sampling option is one field: every command that samples has its flag, and passes on what was typed."""

import dataclasses
import json

import pytest

from rwkv_rlhf.commands import chat, generate_rejects
from rwkv_rlhf.generation import sampling_params
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams, option, options

COMMANDS = {
    "chat": (chat, ["--load_model", "M"]),
    "generate_rejects": (generate_rejects, ["--load_model", "M", "--input_csv", "F"]),
}
# what each command samples with when nothing is typed, where it is not the record's own default
DEFAULTS = {"chat": {"top_p": 0.7}, "generate_rejects": {"top_p": 0.3, "frequency": 1.0, "max_tokens": 1000}}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_flag_of_every_command(name):
    """If this breaks, an answer cannot be sampled again in the other command (chat had no --penalty_decay)."""
    command, words = COMMANDS[name]
    parser = command.parser()
    assert sampling_params.sampling_params(parser.parse_args(words)) == SamplingParams(**DEFAULTS[name])
    typed = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "presence": -0.5, "frequency": 0.75, "penalty_decay": 0.9}
    typed |= {"max_tokens": 9, "seed": -3}
    assert typed.keys() == {field.name for field in options()}
    more = [word for key, value in typed.items() for word in (f"--{key}", str(value))]
    assert sampling_params.sampling_params(parser.parse_args([*words, *more])) == SamplingParams(**typed)


@pytest.fixture
def toy(monkeypatch):
    """An option that nobody knew when the commands were written."""
    fields = [("toy", float, option(0.5, "a toy", least=0, most=1))]
    record = dataclasses.make_dataclass("Toy", fields, bases=(SamplingParams,), frozen=True)
    monkeypatch.setattr(sampling_params, "SamplingParams", record)


@pytest.fixture
def sampled(monkeypatch):
    """Collects what the sampler is asked with."""
    seen, stream = [], Sampler.stream

    def spy(sampler, queue, **more):
        seen.extend(request.params for request in queue)
        return stream(sampler, queue, **more)

    monkeypatch.setattr(Sampler, "stream", spy)
    return seen


def test_a_new_option_reaches_the_sampler(toy, sampled, script, base_model, vocab_file, tmp_path, monkeypatch):
    """From the command line of both scripts, and from inside a conversation; its limits hold there too."""
    (tmp_path / "in.csv").write_text("prompt,chosen\nsay one,gladly\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "say one"}\n')
    common = ["--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32", "--max_tokens", 2]
    output = ["--input_csv", tmp_path / "in.csv", "--output_csv", tmp_path / "out.csv"]
    assert script(generate_rejects.main, *common, *output, "--toy", 0.25)[0] == 0
    assert json.loads((tmp_path / "out.csv.json").read_text())["toy"] == 0.25
    answers = ["--prompt_file", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    assert script(chat.main, *common, *answers)[0] == 0
    lines = iter(["/toy 0.75", "/toy 2", "hello", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, out, err = script(chat.main, *common)
    assert status == 0, err
    assert "/toy 2.0: must be at least 0 and at most 1 (a toy)" in out and "/toy X" in out
    assert [params.toy for params in sampled if params.toy != 0.25] == [0.5, 0.75]
    assert sampled[0].toy == 0.25
    status, _, err = script(chat.main, *common, "--toy", -1)
    assert status == 2 and "--toy -1.0" in err
