"""Reward functions with TRL's signature run unchanged; what is wrong with them is one sentence with the sample."""

import json

import pytest
import torch

from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.rl.rewards import Judge, RewardError, Rewards, load_functions, open_rewards
from rwkv_rlhf.rl.rollout import Asked, Sample
from rwkv_rlhf.settings.config import Config
from tests.support.source_files import ROOT


@pytest.fixture
def file():
    return ROOT / "tests" / "support" / "reward_cases.py"


def sample(text, raw="1+1", copy=0, **columns):
    example = PromptExample([1], raw, columns, "cue", "", True, "in.jsonl:7")
    return Sample(Asked(0, example), copy, [5, 6], text, torch.zeros(2), 0.0, True)


SAMPLES = [sample("2", answer="2"), sample("3", answer="2", copy=1)]


def test_a_function_gets_what_trl_gives_it(file, capsys):
    """Prompts, completions, ids and the other columns, in TRL's words; messages where the prompt is a conversation."""
    functions = load_functions(f"{file}:exact,told,narrow,tensor")
    assert functions["exact"](SAMPLES) == [1.0, 0.0] and functions["narrow"](SAMPLES) == [1.0, 1.0]
    assert functions["tensor"](SAMPLES) == [0.25, 0.25]
    turns = [{"role": "user", "content": "1+1"}]
    assert functions["told"]([sample("2", level=3), sample("3", turns)]) == [0.5, 0.5]
    prompts, completions, ids, columns = json.loads(capsys.readouterr().out)
    assert prompts == ["1+1", turns] and completions == ["2", [{"role": "assistant", "content": "3"}]]
    assert ids == [[5, 6], [5, 6]] and columns == {"level": [3, None]}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raises raised ZeroDivisionError: division by zero at the answer '3' to in.jsonl:7"),
        ("too_few", "too_few gave 1 reward for 2 answers"),
        ("text", "text gave a str ('good') for the answer '2' to in.jsonl:7; a number is needed"),
        ("nan", "nan gave nan for the answer '3' to in.jsonl:7; a number is needed"),
        ("one_number", "one_number gave a float, not a list of numbers"),
        ("leaves", "leaves raised SystemExit: 1 at the answer '2' to in.jsonl:7"),
        ("asks", "asks asks for level, and there is only prompts, completions, completion_ids, answer"),
    ],
)
def test_a_reward_that_is_none_is_named_with_its_sample(file, name, said):
    """If this breaks, a mistake in a reward function trains a model on nonsense, or ends in a traceback."""
    with pytest.raises(RewardError) as caught:
        load_functions(f"{file}:{name}")[name](SAMPLES)
    assert said in str(caught.value)


def test_rewards_are_weighed_and_none_is_left_out(file):
    """2 * exact + 0.5 * silent; where one has no opinion the other counts alone, and where none has it is an error."""
    config = Config(loss="grpo", reward_funcs=f"{file}:exact,silent", reward_weights="2,0.5")
    first, second = open_rewards(config, {})(SAMPLES)
    assert (first.reward, second.reward) == (2.5, 0.0)
    assert first.rewards == {"exact": 1.0, "silent": 1.0} and second.rewards == {"exact": 0.0, "silent": None}
    alone = Rewards({"silent": Judge(load_functions(f"{file}:silent")["silent"])})
    with pytest.raises(RewardError, match=r"no reward for the answer '3' to in.jsonl:7: silent gave None"):
        alone(SAMPLES)
    both = open_rewards(Config(loss="grpo", reward_funcs=f"{file}:exact"), {"model": lambda samples: [3.0, 4.0]})
    assert [one.reward for one in both(SAMPLES)] == [4.0, 4.0] and both([]) == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("missing.py:exact", "there is no file"),
        ("{file}", "expected a file and functions in it"),
        ("{file}:exact,exact", "expected a file and functions in it"),
        ("{file}:wrong", "has no function wrong; it has exact"),
        ("{broken}:exact", "cannot be imported: SyntaxError"),
        ("{leaves}:exact", "cannot be imported: SystemExit: 3"),
    ],
)
def test_a_reward_file_that_is_no_use_is_refused_before_the_run(file, setting, said, tmp_path):
    """One sentence with the flag, before a model is loaded into memory for nothing."""
    (tmp_path / "broken.py").write_text("def exact(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError) as caught:
        load_functions(setting.format(file=file, broken=tmp_path / "broken.py", leaves=tmp_path / "leaves.py"))
    assert said in str(caught.value) and "{reward_funcs}" in str(caught.value)


def test_a_reward_file_may_import_its_neighbours(tmp_path):
    """People keep what several reward functions share in a file beside them."""
    (tmp_path / "neighbour.py").write_text("HALF = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour import HALF\nhalf = lambda completions: [HALF] * len(completions)\n"
    )
    assert load_functions(f"{tmp_path}/mine.py:half")["half"](SAMPLES) == [0.5, 0.5]


@pytest.mark.parametrize("weights", ["1", "1,x", "1,2,3", "1,nan"])
def test_weights_that_do_not_fit(file, weights):
    """As many finite numbers as there are rewards."""
    with pytest.raises(ValueError, match="reward_weights"):
        open_rewards(Config(loss="grpo", reward_funcs=f"{file}:exact,silent", reward_weights=weights), {})
