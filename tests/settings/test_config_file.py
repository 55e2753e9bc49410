"""Settings in files: what --config takes, refuses and prefers, and that a run's own file is that run again."""

import dataclasses
import json
import re
import shlex

import jsonschema
import pytest

from rwkv_rlhf.commands.config import main
from rwkv_rlhf.settings.command_line import UsageError, kinds, parse
from rwkv_rlhf.settings.config import Config, settings
from rwkv_rlhf.settings.config_file import RUN_FILE, config_text, read_config_files, schema
from rwkv_rlhf.settings.field import choices_of
from rwkv_rlhf.settings.tables import LOSSES
from tests.support.source_files import ROOT

DPO = """
load_model: base.pth   # a comment
loss: dpo
pair_file: pairs.csv
lr_init: 1e-5
grad_cp: false
quant: 0
dpo_beta: 1
wandb: 7
n_layer: null
"""


def parsed(tmp_path, text, *words):
    """The Config of a file of this text and further words."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse(["--config", str(path), *words])


def test_a_file_is_what_the_same_flags_are(tmp_path):
    """1e-5 is text to YAML, 0 stands for false, a project is called 7: else a run has other settings than written."""
    flags = "--load_model base.pth --dpo 1 --rlhf_train_file pairs.csv --lr_init 1e-5 --grad_cp 0 --quant 0"
    assert parsed(tmp_path, DPO) == parse([*flags.split(), "--dpo_beta", "1", "--wandb", "7"])


def test_what_is_typed_wins_and_later_files_win(tmp_path):
    """The last word is the one nearest to the user, also for the loss and for --lora 1."""
    other = tmp_path / "other.yaml"
    other.write_text("lr_init: 3e-5\npeft: bone\n")
    config = parsed(tmp_path, DPO, "--config", str(other), "--dpo_beta", "0.5", "--orpo", "1", "--lora", "1")
    assert (config.lr_init, config.dpo_beta, config.loss, config.peft) == (3e-5, 0.5, "orpo", "lora")


@pytest.mark.parametrize(
    "text, said",
    [
        ("lr_int: 1e-5", r"run\.yaml: 'lr_int' is no setting; the nearest is lr_init$"),
        ("rlhf_train_file: a", "'rlhf_train_file' is no setting; the nearest is pair_file$"),
        ("--lr-init: 1", "the nearest is lr_init$"),
        ("dpo: 1", "'dpo' is no setting; write `loss: dpo`$"),
        ("xyzzy: 1", "'xyzzy' is no setting; `--help` lists all$"),
        ("lr_init: fast", r"run\.yaml: lr_init: expected a number, found 'fast'$"),
        ("lr_init: .nan", "lr_init: expected a number, found nan$"),
        ("micro_bsz: 1.5", "micro_bsz: expected a whole number, found 1.5$"),
        ("micro_bsz: true", "micro_bsz: expected a whole number, found True$"),
        ("grad_cp: maybe", "grad_cp: expected true or false, found 'maybe'$"),
        ("grad_cp: 2", "grad_cp: expected true or false, found 2$"),
        ("data_file: [a, b]", r"data_file: expected text, found \['a', 'b'\]$"),
        ("wandb: no", "wandb: expected text, found False$"),
        ("lr_init: 1\nlr_init: 2", "'lr_init' stands there twice, with two values$"),
        ("lr_init: -1", "--lr_init"),
        ("loss: dqo\npair_file: a", r"run\.yaml: loss: must be one of sft, .*, not 'dqo'$"),
        ("a: [", "line 2: not YAML: "),
        ("\tloss: dpo", "line 1: not YAML: "),
        ("just words", "expected lines such as `loss: dpo`, found str$"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, said):
    """If this breaks, a typo in a file trains something else, or ends with a traceback."""
    with pytest.raises(UsageError, match=said) as error:
        parsed(tmp_path, f"{text}\n", "--load_model", "base.pth")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_text_is_named(tmp_path):
    """If this breaks, the sentence speaks of a codec and of no file."""
    (tmp_path / "run.yaml").write_bytes(b"loss: dpo\xff\n")
    for path, said in ((tmp_path / "run.yaml", "byte 9 is not UTF-8"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(UsageError, match=f"--config {path}:? {said}"):
            parse(["--config", str(path)])


@pytest.mark.parametrize(
    "text", ["a\x85b", "a\u2028b", "\ufeffa", "\u732b", "a\nb", "\x1b", " a ", "'\"", "#", "caf\udce9"]
)
def test_a_name_of_any_characters_comes_back_from_the_file_of_a_run(tmp_path, text):
    """If this breaks, a run that is repeated from its config.yaml reads another file."""
    config = Config(load_model="m.pth", data_file=text, given=frozenset({"load_model", "data_file"}))
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config), encoding="utf-8")
    assert read_config_files([str(path)], kinds())["data_file"] == text


def test_a_file_that_is_not_there_is_named():
    """The sentence names the flag and the path."""
    with pytest.raises(UsageError, match=r"^--config nowhere\.yaml: there is no such file$"):
        parse(["--config", "nowhere.yaml"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("example/*/run.yaml")), ids=lambda path: path.parent.name)
def test_an_example_is_the_same_as_file_and_as_script(path, monkeypatch):
    """If this breaks, the two ways of starting an example train different models."""
    monkeypatch.chdir(ROOT)
    script = path.parent / re.match(r"# the settings of (\S+\.sh):", path.read_text())[1]  # one of several
    text = script.read_text().replace("\\\n", "")
    commands = re.findall(r"^python train\.py (.*)$", text, re.M)
    (command,) = [line for line in commands if "--train_stage 1" not in line]
    base = re.search(r"\$\{1:-([^}]*)\}|$", text)[1] or ""
    typed = parse(shlex.split(re.sub(r'"\$[A-Z]+"', base, command)))
    assert parse(["--config", str(path)]) == typed


def test_every_example_that_trains_has_its_file():
    """Who looks for a file to start from finds one beside each method."""
    training = {file.parent for file in ROOT.glob("example/*/*.sh") if "python train.py" in file.read_text()}
    assert training == {path.parent for path in ROOT.glob("example/*/run.yaml")}


@pytest.mark.parametrize(
    "loss", [loss for loss, facts in LOSSES.items() if facts.implementation and facts.data == "pairs"]
)
def test_the_file_of_a_run_is_the_run_again(tmp_path, loss):
    """What was typed, defaults that were typed on purpose among it; --resume belongs to one start."""
    words = f"--load_model base.pth --{loss} 1 --rlhf_train_file p.csv --ctx_len 2048 --lr_init 0.00002 --wandb 7"
    config = parse([*words.split(), "--resume", "auto", "--template", "g1"])
    text = config_text(config)
    again = parsed(tmp_path, text)
    assert again == dataclasses.replace(config, resume="", given=config.given - {"resume"})
    assert config_text(again) == text


def test_the_command_prints_the_file_or_the_schema(tmp_path, capsys):
    """`rwkv-rlhf config` checks settings before anything is loaded; its output is accepted again."""
    path = tmp_path / RUN_FILE
    path.write_text(DPO)
    assert main(["--config", str(path), "--lr_init", "2e-5"]) is None
    printed = capsys.readouterr().out
    assert parsed(tmp_path, printed) == parse(["--config", str(path), "--lr_init", "2e-5"])
    assert main(["--schema"]) is None
    assert json.loads(capsys.readouterr().out) == schema(kinds())


def test_the_schema_knows_every_setting_and_its_limits():
    """An editor that reads it completes names and underlines what a run would refuse."""
    judge = jsonschema.Draft202012Validator(schema(kinds()))
    jsonschema.Draft202012Validator.check_schema(judge.schema)
    assert list(judge.schema["properties"]) == list(settings())
    assert judge.is_valid({"loss": "dpo", "lr_init": 1e-5, "grad_cp": False, "val_split": 0.5})
    for wrong in (
        {"loss": "dqo"},
        {"lr_init": "fast"},
        {"val_split": 1},
        {"micro_bsz": 0},
        {"lr_int": 1},
        {"grad_cp": 2},
    ):
        assert not judge.is_valid(wrong), wrong
    for name, field in settings().items():
        for choice in choices_of(field):
            assert choice == "" or judge.is_valid({name: choice}), (name, choice)


def test_the_command_reads_what_training_reads(capsys):
    """Spellings of other programs are no mistake here either; an unknown flag still is."""
    assert main(["--load_model", "base.pth", "--sft", "1", "--data_file", "d.jsonl", "--state_tune", "1"]) is None
    assert "\npeft: state\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown flag --lr_inti"):
        main(["--lr_inti", "1"])
