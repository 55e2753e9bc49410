"""What answers one prompt stays together, whatever template each row was written with."""

import json

import pytest

from rwkv_rlhf.data.pairs.dataset import open_pairs
from rwkv_rlhf.data.pairs.rated import open_rated, unpair
from rwkv_rlhf.data.pairs.save import sidecar_path, write_save
from rwkv_rlhf.data.pairs.tokenising import PairOptions, PairTokeniser
from rwkv_rlhf.data.split import split
from tests.support.files import jsonl, write_csv

PROMPTS, ANSWERS = 40, 4


@pytest.fixture
def pairs_csv(tmp_path):
    """40 prompts with 4 pairs each."""
    rows = [[f"question {p}", f"good {p} {a}", f"bad {p} {a}"] for p in range(PROMPTS) for a in range(ANSWERS)]
    return write_csv(tmp_path / "pairs.csv", rows)


def asked(examples, world):
    """The numbers of the prompts, read out of what is trained on."""
    return {int(world.decode(example.prompt).split("question ")[1].split()[0]) for example in examples}


def held_out_leaks(pairs, world):
    """How many held-out prompts there are, and how many of them are trained on as well."""
    train, held = (asked(part, world) for part in split(pairs, 0.1, seed=0))
    return len(held), len(train & held)


def test_no_held_out_prompt_is_trained_on_with_mixed_templates(pairs_csv, world):
    """Otherwise held-out figures rise by memory, and rwkv-best is the checkpoint that remembers best."""
    assert held_out_leaks(open_pairs(pairs_csv, world, template="mixed"), world) == (4, 0)
    assert held_out_leaks(unpair(open_pairs(pairs_csv, world, template="mixed")), world) == (4, 0)


def test_a_save_says_which_pairs_have_one_prompt(pairs_csv, tmp_path, world):
    """Cycled over mixed templates, cut and read back; without that knowledge --val_split is refused, and it is said."""
    path = tmp_path / "a.save"
    made = PairTokeniser(pairs_csv, world, PairOptions(template="mixed")).pairs(640)
    write_save(path, made, {"template": "mixed"})
    whole, cut = open_pairs(path, world), open_pairs(path, world, max_len=5)
    held, leaks = held_out_leaks(whole, world)
    assert (held > 0, leaks) == (True, 0)
    assert [whole.group(index) for index in range(640)] == [cut.group(index) for index in range(640)]
    cut.check_prompts("{val_split}")
    about = json.loads((tmp_path / "a.save.json").read_text())
    assert len(set(about.pop("prompts").split())) == PROMPTS
    (tmp_path / "a.save.json").write_text(json.dumps(about))
    old = open_pairs(path, world)
    assert any("make the file anew" in notice for notice in old.report.notices)
    with pytest.raises(ValueError, match=r"\{val_split\}: .*a\.save was made with several templates"):
        old.check_prompts("{val_split}")
    (tmp_path / "a.save.json").write_text(json.dumps(about | {"template": "world"}))
    open_pairs(path, world).check_prompts("{val_split}")  # there the tokens tell
    assert sidecar_path(path).endswith("a.save.json")


def test_ktos_other_prompt_is_another_one(tmp_path, world):
    """An answer to the same question in another template is none to another prompt: the divergence is too low."""
    rows = [
        {"prompt": f"question {p}", "completion": f"about {p} {a}", "label": a % 2} for p in range(5) for a in range(8)
    ]
    rated = open_rated(jsonl(tmp_path / "a.jsonl", *rows), world, template="mixed")
    for example in rated:
        assert asked([example], world) != {int(world.decode(example.reject).split()[1])}


def test_repeated_answers_are_counted_under_any_template(tmp_path, world):
    """The remark about repeats is the only sign of a file that was joined with itself."""
    rows = [{"prompt": "question", "completion": "yes", "label": 1}] * 20
    rows.append({"prompt": "another", "completion": "no", "label": 0})
    rated = open_rated(jsonl(tmp_path / "a.jsonl", *rows), world, template="mixed")
    assert rated.report.remarked["repeat another one"] == 19
