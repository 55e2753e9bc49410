"""Evaluation tasks: every number is computed again from the logits of single passes, in float64."""

import math

import pytest
import torch

from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.settings.eval_tasks import check_eval_tasks, eval_tasks
from rwkv_rlhf.tasks import continuations
from rwkv_rlhf.tasks.continuations import Asked, likelihoods
from rwkv_rlhf.tasks.lambada import lambada
from rwkv_rlhf.tasks.measure import measure
from rwkv_rlhf.tasks.text_model import Question, TextModel
from tests.support.files import VOCAB, jsonl
from tests.support.models import build, random_tensors

SHOTS = "Question: what is one and one? Answer: two.\n"  # more than what is worth a pass of its own


@pytest.fixture(scope="module", params=["x070", "x040"])
def model(request):
    """A small model in which no tensor is zero."""
    return build(random_tensors(request.param, vocab_size=VOCAB)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def asked_by_text(model, vocab_file):
    """The same, asked by texts."""
    return TextModel(model, load_tokenizer(VOCAB, str(vocab_file)))


@torch.no_grad()
def by_hand(model, context, continuation):
    """(summed log p, whether all are the likeliest) from one pass over everything."""
    ids = [*context, *continuation]
    logits = model.head(model(torch.tensor([ids]))[0][0]).double()
    logp, greedy = 0.0, True
    for at, token in enumerate(continuation, len(context) - 1):
        logp += float(logits[at, token] - torch.logsumexp(logits[at], 0))
        greedy = greedy and int(logits[at].argmax()) == token
    return logp, greedy


def same(model, asked, found):
    """Whether likelihoods are those of single passes."""
    assert len(asked) == len(found)
    for one, likelihood in zip(asked, found):
        logp, greedy = by_hand(model, *one)
        assert likelihood.logp == pytest.approx(logp, rel=1e-4, abs=1e-4) and likelihood.greedy == greedy


def questions(model):
    """Contexts that begin alike, with several answers, one of one token; a greedy answer; no answer."""
    shared = tuple(range(1, 30))
    contexts = [(*shared, *extra) for extra in ((5,), (6, 7), (6, 7, 8), ())]
    asked = [Asked(context, answer) for context in contexts for answer in ((9,), (10, 11), (10, 12, 13))]
    logits = model.head(model(torch.tensor([contexts[0]]))[0][0, -1])
    asked += [Asked(contexts[0], (int(logits.argmax()),)), Asked((*shared, 4), ())]
    return asked[::-1]


@pytest.mark.parametrize("more", [[], [Asked((0,), (3, 4)), Asked((0, 2), (3, 4))]], ids=["shared", "apart"])
def test_likelihoods_are_those_of_single_passes(model, more):
    """If this breaks, a task is scored after another context than its question, or answers stand in another order."""
    asked = questions(model) + more
    same(model, asked, likelihoods(model, asked))


def test_what_is_longer_than_a_row(model, monkeypatch):
    """If this breaks, long questions or documents lose what stood before a border."""
    monkeypatch.setattr(continuations, "ROW", 24)
    monkeypatch.setattr(continuations, "PIECE", 7)
    monkeypatch.setattr(continuations, "HEAD", 3)
    long = tuple(int(token) for token in torch.randint(1, VOCAB, (60,)))
    asked = [*questions(model), Asked(long, (7,)), Asked((0,), long), Asked(long, long[:40])]
    same(model, asked, likelihoods(model, asked))


def test_what_contexts_share_runs_once(model, monkeypatch):
    """If this breaks, each answer costs a pass over its question, and each question one over the examples before it."""
    counted, forward = [], type(model).forward

    def counting(self, tokens, state=None, starts=None):
        counted.append(tokens.numel())
        return forward(self, tokens, state, starts)

    monkeypatch.setattr(type(model), "forward", counting)
    shared = tuple(range(1, 101))
    contexts = [(*shared, question, 2) for question in (3, 4, 5)]
    likelihoods(model, [Asked(context, (answer,)) for context in contexts for answer in range(4)])
    assert sum(counted) == len(shared) + 3 * 1 + 3 * 4  # the last token of each context begins each answer


def test_texts_are_cut_where_the_harness_cuts_them(asked_by_text):
    """If this breaks, white space before an answer is scored twice or never, and figures compare with nobody's."""
    found = asked_by_text.pair("Answer: ", "two")
    text = asked_by_text.tokenizer.decode
    assert (text(list(found.context)), text(list(found.continuation))) == ("Answer:", " two")
    assert found.context[0] == 0 and asked_by_text.pair("", "a").context == (0,)


def test_whole_texts_and_answers(model, asked_by_text):
    """If this breaks, perplexities of documents leave out tokens, or an answer depends on the other questions."""
    texts = ["a whole text", "", "another one"]
    expected = [by_hand(model, (0,), asked_by_text.tokenizer.encode(text))[0] for text in texts]
    assert asked_by_text.whole(texts) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    params = SamplingParams(temperature=0, max_tokens=5, stop_texts=("\n",))
    ask = [Question(f"{SHOTS}Question: {n}?", params) for n in ("one", "two", "one")]
    together = asked_by_text.answers(ask)
    assert together == [asked_by_text.answers([one])[0] for one in ask] and together[0] == together[2]


def test_lambada_is_rwkvs_own_measure(model, asked_by_text, tmp_path):
    """If this breaks, a perplexity of LAMBADA cannot be compared with those that RWKV's models are published with."""
    texts = ["he gave her the key to the house", "and then it was over .", "two words"]
    path = jsonl(tmp_path / "lambada.jsonl", *({"text": text} for text in texts))
    encode, total, right = asked_by_text.tokenizer.encode, 0.0, 0
    for text in texts:
        before, last = text.rsplit(" ", 1)
        logp, greedy = by_hand(model, [0, *encode(before)], encode(" " + last))
        total, right = total + logp, right + greedy
    found = lambada(asked_by_text, path)
    assert found["perplexity"] == pytest.approx(math.exp(-total / 3), rel=1e-4)
    assert found["accuracy"] == right / 3 and found["passages"] == 3
    plain = tmp_path / "lambada.txt"
    plain.write_text("\n".join(texts) + "\n\n")
    assert lambada(asked_by_text, plain)["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    some = measure(eval_tasks(f"lambada:{path}"), asked_by_text, limit=2)
    assert some["lambada/passages"] == 2 and list(some) == [
        "lambada/perplexity",
        "lambada/accuracy",
        "lambada/passages",
    ]


@pytest.mark.parametrize(
    ("written", "said"),
    [("word\n", r":1: expected a passage"), ('{"text": 1}\n', ":1: expected a passage"), ("{", ":1: this is no JSON")],
)
def test_a_file_that_is_no_lambada(asked_by_text, tmp_path, written, said):
    """If this breaks, a wrong file ends in a traceback in the middle of a run."""
    path = tmp_path / ("bad.jsonl" if "{" in written else "bad.txt")
    path.write_text(written)
    with pytest.raises(ValueError, match=said):
        lambada(asked_by_text, path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no passage"):
        lambada(asked_by_text, path)


def test_what_tasks_a_run_names(tmp_path, monkeypatch):
    """If this breaks, a missing file or package is found after the model was loaded, or trained."""
    file = jsonl(tmp_path / "l.jsonl", {"text": "a b"})
    assert eval_tasks(f" lambada:{file}, hellaswag ,x.yaml") == ((str(file),), ("hellaswag", "x.yaml"))
    check_eval_tasks("")
    check_eval_tasks(f"lambada:{file}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for spec, said in (
        ("lambada:no.jsonl", "there is no file 'no.jsonl'"),
        ("no.yaml", "there is no file 'no.yaml'"),
        (",", "names no task"),
        ("hellaswag", "hellaswag needs the package lm_eval: pip install lm_eval"),
    ):
        with pytest.raises(ValueError, match=said):
            check_eval_tasks(spec)
