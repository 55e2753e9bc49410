"""lm-evaluation-harness with our model: its own tasks, from local files, against numbers that are computed by hand."""

import json
import math
from types import SimpleNamespace

import pytest

from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.tasks.text_model import Question, TextModel
from tests.support.files import VOCAB, jsonl
from tests.support.models import build, random_tensors

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")

ROWS = [
    {"question": "one and one?", "choices": ["two", "three", "a very long answer"], "answer": 0},
    {"question": "sky?", "choices": ["blue", "red", "green"], "answer": 1},
]
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "Q: {{question}}\nA:"}
CHOICE = COMMON | {
    "task": "our_choice",
    "output_type": "multiple_choice",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = COMMON | {
    "task": "our_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
ANSWERS = COMMON | {
    "task": "our_answers",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def model(vocab_file):
    """A small model, asked by texts."""
    return TextModel(
        build(random_tensors(vocab_size=VOCAB)).requires_grad_(False).eval(), load_tokenizer(VOCAB, str(vocab_file))
    )


def task(folder, about):
    """A task of one's own: a YAML file beside its data."""
    data = jsonl(folder / "rows.jsonl", *ROWS)
    path = folder / f"{about['task']}.yaml"
    path.write_text(json.dumps(about | {"dataset_kwargs": {"data_files": {"test": str(data)}}}))
    return str(path)


@pytest.fixture(autouse=True)
def cached_here(tmp_path, monkeypatch):
    """The library that reads the rows keeps its copies in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_harness_counts_what_our_numbers_say(model, tmp_path, capsys, caplog):
    """If this breaks, accuracies of the harness are those of other answers than the model prefers, or bars of other
    libraries are drawn into the one of the run."""
    caplog.set_level("INFO")
    from rwkv_rlhf.tasks.harness import harness_figures

    found = harness_figures([task(tmp_path, about) for about in (CHOICE, ROLLING, ANSWERS)], model)
    right, normed = 0, 0
    for row in ROWS:
        asked = [model.pair(f"Q: {row['question']}\nA:", f" {choice}") for choice in row["choices"]]
        logps = [one.logp for one in model.likelihoods(asked)]
        right += logps.index(max(logps)) == row["answer"]
        each = [logp / len(choice) for logp, choice in zip(logps, row["choices"])]
        normed += each.index(max(each)) == row["answer"]
    assert "%|" not in capsys.readouterr().err
    assert "our_choice (2 questions), our_text (2 questions), our_answers (2 questions)" in caplog.text
    assert found["our_choice/acc"] == right / 2 and found["our_choice/acc_norm"] == normed / 2
    words = sum(len(row["question"].split()) for row in ROWS)
    whole = sum(model.whole([row["question"] for row in ROWS]))
    assert found["our_text/word_perplexity"] == pytest.approx(math.exp(-whole / words), rel=1e-5)
    params = SamplingParams(temperature=0, max_tokens=4, stop_texts=("\n",))
    answers = model.answers([Question(f"Q: {row['question']}\nA:", params) for row in ROWS])
    assert found["our_answers/exact_match"] == sum(a == row["choices"][0] for a, row in zip(answers, ROWS)) / 2
    assert harness_figures([task(tmp_path, CHOICE)], model, limit=1).keys() == {"our_choice/acc", "our_choice/acc_norm"}


def test_the_three_kinds_of_requests(model):
    """If this breaks, the harness hears numbers of another request than it asked."""
    from rwkv_rlhf.tasks.harness import HarnessModel, params_of

    ours = HarnessModel(model)

    def asked(*args):
        return SimpleNamespace(args=args)

    pairs = [("Q: ", "one"), ("", "two"), ("Q: ", "three")]
    scores = model.likelihoods([model.pair(*pair) for pair in pairs])
    assert ours.loglikelihood([asked(*pair) for pair in pairs]) == [tuple(score) for score in scores]
    assert ours.loglikelihood_rolling([asked("a text")]) == model.whole(["a text"])
    assert len(ours.generate_until([asked("Q:", {"until": "\n", "max_gen_toks": 3})])[0]) <= 3
    assert params_of({"do_sample": True, "temperature": 0.7, "until": ["\n", ""]}).stop_texts == ("\n",)
    assert params_of({"do_sample": False, "temperature": 0.7}).temperature == 0 and params_of({}).max_tokens == 256


@pytest.mark.parametrize(("name", "said"), [("helaswag", "did you mean hellaswag"), ("bad.yaml", "bad.yaml")])
def test_a_task_that_there_is_not(model, tmp_path, monkeypatch, name, said):
    """If this breaks, a typing error is a traceback of the harness."""
    from rwkv_rlhf.tasks import harness

    if name == "helaswag":  # the real list takes long to read
        monkeypatch.setattr(harness, "manager", lambda defaults: SimpleNamespace(all_tasks=["hellaswag", "piqa"]))
    (tmp_path / "bad.yaml").write_text("task: [")
    name = str(tmp_path / name) if name.endswith("yaml") else name
    with pytest.raises(ValueError, match=said):
        harness.harness_figures([name], model)
