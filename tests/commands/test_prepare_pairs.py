"""Preparing preference data: splits, ties, published sets, chat templates, kills, and the model that made it."""

import json
import os
import signal
import time
from collections import Counter

import pytest
import torch

from rwkv_rlhf.commands import chat, prepare_pairs, score_pairs
from rwkv_rlhf.commands import generate_rejects as rejects
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.pairs.tokenising import PairOptions, PairTokeniser
from rwkv_rlhf.data.templates.jinja import load_chat_template
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.rows import Completion, Finished
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.scoring import kept_scores
from tests.support.files import JINJA, ROWS, read_csv, write_csv
from tests.support.processes import started


@pytest.fixture
def words(base_model, vocab_file, tmp_path):
    """The flags of a small sampling run, without input and output."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32"),
        *("--max_tokens", 12, "--batch_size", 2),
    ]


@pytest.fixture
def ultrafeedback(tmp_path):
    """A parquet file of the columns that the published sets have: message lists and scores; row 3 is a tie."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def talk(n, answer):
        return [{"content": f"ask {n}", "role": "user"}, {"content": answer, "role": "assistant"}]

    columns = {
        "prompt": [f"ask {n}" for n in range(20)],
        "prompt_id": [f"{n:x}" for n in range(20)],
        "chosen": [talk(n, f"well, {n}") for n in range(20)],
        "rejected": [talk(n, f"bad {n}") for n in range(20)],
        "messages": [talk(n, f"well, {n}") for n in range(20)],
        "score_chosen": [8.0 if n != 4 else 3.0 for n in range(20)],
        "score_rejected": [8.0 if n == 3 else 5.0 for n in range(20)],
    }
    path = tmp_path / "train_prefs.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_published_parquet_is_split_like_the_recipe(ultrafeedback, tmp_path, caplog):
    """If this breaks, held-out pairs share prompts with training, or ties and odd scores pass without a word."""
    caplog.set_level("INFO")
    common = ["--input_csv", str(ultrafeedback), "--output_save", str(tmp_path / "trainset.save")]
    prepare_pairs.main([*common, "--split", "0.8,0.1,0.1", "--drop_ties", "1", "--target_pair_count", "40"])
    world = load_tokenizer(65536)
    parts = {name: torch.load(tmp_path / f"{name}set.save", weights_only=True) for name in ("train", "valid", "test")}
    prompts = {name: Counter(world.decode(record[0]) for record in records) for name, records in parts.items()}
    assert [sum(prompts[name].values()) for name in parts] == [32, 1, 1]
    assert not set(prompts["train"]) & (set(prompts["valid"]) | set(prompts["test"]))
    assert len(set().union(*prompts.values())) == 19 and "User: ask 3\n\nAssistant:" not in set().union(
        *prompts.values()
    )
    assert {world.decode(record[1]) for record in parts["valid"]} <= {f" well, {n}\n\n" for n in range(20)}
    assert "skipped 1: tie" in caplog.text
    assert "1 row scores the rejected answer higher" in caplog.text
    assert json.loads((tmp_path / "validset.save.json").read_text())["records"] == 1
    before = [(tmp_path / f"{name}set.save").read_bytes() for name in parts]
    prepare_pairs.main([*common, "--split", "0.8,0.1,0.1", "--drop_ties", "1", "--target_pair_count", "40"])
    assert [(tmp_path / f"{name}set.save").read_bytes() for name in parts] == before


def test_a_split_keeps_a_prompt_together_and_says_when_it_cannot(tmp_path):
    """Rows of one prompt go to one side; too few prompts for the parts is one sentence."""
    path = write_csv(tmp_path / "in.csv", [[f"p{n // 3}", f"yes {n}", f"no {n}"] for n in range(30)])
    world = load_tokenizer(65536)
    tokeniser = PairTokeniser(path, world, PairOptions())
    parts, report = tokeniser.parts((0.5, 0.5)), tokeniser.report
    sides = [{tuple(pair.prompt) for pair in part} for part in parts]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10 and report.examples == 30
    assert [len(part) for part in parts] == [15, 15]
    one = write_csv(tmp_path / "one.csv", [["p", "x", "y"]])
    with pytest.raises(ValueError, match=r"--split: .*one\.csv has 1 usable prompt,"):
        PairTokeniser(one, world, PairOptions()).parts((0.8, 0.1, 0.1))
    for wrong in ("0.8", "0.5,0.6", "a,b", "1,0", "0.4,0.2,0.2,0.2"):
        with pytest.raises(ValueError, match="--split"):
            prepare_pairs.main(["--input_csv", str(one), "--split", wrong, "--output_save", str(tmp_path / "o.save")])


def test_jsonl_in_and_out_keeps_what_is_there(script, words, tmp_path):
    """Message lists, other keys and own rejects survive; only missing rejects are sampled; CSV cannot hold lists."""
    talk = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "gladly\u2028one"}]
    records = [
        {"prompt": "say one", "chosen": talk, "score": 3},
        {"prompt": "say two", "chosen": "gladly: two", "rejected": "no, two"},
        {"prompt": "say three", "chosen": "gladly: three", "rejected": None},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out.jsonl"
    assert script(rejects.main, "--input_csv", source, "--output_csv", out, *words)[0] == 0
    made = [json.loads(line) for line in out.read_text().strip().split("\n")]
    assert made[0]["chosen"] == talk and made[0]["score"] == 3 and made[0]["rejected"]
    assert made[1] == records[1] and made[2]["rejected"]
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 9])  # a kill in the middle of the second row
    assert script(rejects.main, "--input_csv", source, "--output_csv", out, *words)[0] == 0
    assert out.read_bytes() == whole
    status, _, err = script(rejects.main, "--input_csv", source, "--output_csv", tmp_path / "o.csv", *words)
    assert status == 2 and ".jsonl" in err


def test_sampling_says_its_speed(script, words, tmp_path, caplog):
    """Tokens per second and how many were sampled together, so that --batch_size can be chosen."""
    caplog.set_level("INFO")
    source = write_csv(tmp_path / "in.csv", [[f"say {n}", f"gladly {n}", ""] for n in range(10)])
    status, _, err = script(
        rejects.main, "--input_csv", source, "--output_csv", tmp_path / "out.csv", *words, "--batch_size", 8
    )
    assert status == 0, err
    assert "tokens/s, up to 8 answers at once" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(390)
def test_a_kill_loses_and_repeats_nothing(base_model, vocab_file, tmp_path):
    """SIGKILL in the middle, twice; the same command goes on and ends with the very bytes of an unbroken run."""
    source = write_csv(tmp_path / "in.csv", [[f"say {n}", f'gladly: "{n}"\nok', ""] for n in range(20)])
    words = ["--load_model", str(base_model), "--vocab_file", str(vocab_file), "--input_csv", str(source)]
    words += ["--strategy", "cpu fp32", "--max_tokens", "60", "--batch_size", "2", "--frequency", "0"]
    rejects.main([*words, "--output_csv", str(tmp_path / "whole.csv")])
    out, rows = tmp_path / "out.csv", []
    for wanted in (3, 7):
        process = started("rlhf_generate_reject_csv.py", *words, "--output_csv", out)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if out.exists() and out.read_bytes().count(b"gladly") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate()
        rows.append(out.read_bytes().count(b"gladly"))
    assert process.returncode == -signal.SIGKILL and rows[0] <= rows[1] < 20, "the kills came too late to test anything"
    rejects.main([*words, "--output_csv", str(out)])
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_only_the_same_model_goes_on(script, words, tmp_path, base_model):
    """Half of the rejects by one model and half by another would be a set that nobody can describe."""
    source, out = write_csv(tmp_path / "in.csv", ROWS), tmp_path / "out.csv"
    run = ["--input_csv", source, "--output_csv", out, *words]
    assert script(rejects.main, *run)[0] == 0
    whole = out.read_bytes()
    half = whole[: whole.index(b"say four")]
    other = tmp_path / "other.pth"
    tensors = torch.load(base_model, weights_only=True)
    torch.save(tensors | {"head.weight": tensors["head.weight"] + 1}, other)
    for changed, said in ((("--load_model", other), "model"), (("--top_p", 0.9), "top_p"), (("--seed", 5), "seed")):
        out.write_bytes(half)
        status, _, err = script(rejects.main, *run, *changed)
        assert status == 2 and "half finished" in err and said in err
        assert out.read_bytes() == half
    assert script(rejects.main, *run, "--batch_size", 3)[0] == 0  # each row has its own seed
    assert out.read_bytes() == whole
    out.write_bytes(half)
    (tmp_path / "out.csv.json").unlink()  # made before there were sidecars
    assert script(rejects.main, *run)[0] == 0
    assert out.read_bytes() == whole


def test_bad_rows_can_be_left_out_of_sampling(script, words, tmp_path, caplog):
    """Counted, not silent; without the flag the first is an error (see test_generate_scripts)."""
    caplog.set_level("INFO")
    source = write_csv(tmp_path / "in.csv", [*ROWS[:1], ["x", "", ""], ["y\0", "z", ""], *ROWS[3:]])
    run = ["--input_csv", source, "--output_csv", tmp_path / "out.csv", *words, "--skip_bad", 1]
    assert script(rejects.main, *run)[0] == 0
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == ["say one", "say four", "say five"]
    assert "1 row left out: empty chosen" in caplog.text and "1 row left out: NUL byte" in caplog.text


def test_reference_scores_survive_a_stop(base_model, vocab_file, pairs_csv, tmp_path, monkeypatch, caplog):
    """Scoring for hours and losing it to a kill; the file's bytes are those of an unbroken run."""
    caplog.set_level("INFO")
    monkeypatch.setattr("rwkv_rlhf.scoring.evaluation.ROW", 200)  # a few pairs a row
    common = ["--load_model", str(base_model), "--vocab_file", str(vocab_file), "--input_csv", str(pairs_csv)]
    common += ["--target_pair_count", "40", "--strategy", "cpu fp32", "--split", "0.75,0.25", "--output_save"]
    score_pairs.main([*common, str(tmp_path / "whole.save")])
    score, calls = kept_scores.score_pairs, []

    def stopped(*arguments, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*arguments, **more)

    monkeypatch.setattr(kept_scores, "score_pairs", stopped)
    with pytest.raises(KeyboardInterrupt):
        score_pairs.main([*common, str(tmp_path / "a.save")])
    part = tmp_path / "a.save.part"
    lines = part.read_bytes().split(b"\n")
    assert len(lines) == 1 + 3 + 1
    part.write_bytes(part.read_bytes() + b"[[-1.0, -")  # the row that was being written
    score_pairs.main([*common, str(tmp_path / "a.save")])
    assert "were scored by an earlier run" in caplog.text and not part.exists()
    for name in ("train", "valid"):
        assert (tmp_path / f"a-{name}.save").read_bytes() == (tmp_path / f"whole-{name}.save").read_bytes()
    part.write_bytes(b"another key\n[[-1.0, -2.0]]\n")  # of another model or other pairs
    score_pairs.main([*common, str(tmp_path / "a.save")])
    assert (tmp_path / "a-train.save").read_bytes() == (tmp_path / "whole-train.save").read_bytes()


def test_chat_template_of_a_tokenizer(tmp_path):
    """Jinja from tokenizer_config.json: prompt, answer and closing mark as that template writes them."""
    config = {"chat_template": JINJA, "bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    (tmp_path / "in.csv").write_text("system,prompt,chosen,reject\nBe kind.,Hi,Hello.,Go.\n")
    words = ["--input_csv", str(tmp_path / "in.csv"), "--template", str(path), "--target_pair_count", "1"]
    prepare_pairs.main([*words, "--output_save", str(tmp_path / "a.save")])
    world = load_tokenizer(65536)
    record = torch.load(tmp_path / "a.save", weights_only=True)[0]
    assert [world.decode(part) for part in record[:3]] == [
        "<s><|system|>Be kind.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>",
        "Hello.<|end|>\n",
        "Go.<|end|>\n",
    ]


HARD = """{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif -%}
{{ bos_token }}{% for m in messages %}
    {%- if loop.index0 > 9 %}{% break %}{% endif -%}
    {%- if m.role == 'assistant' %}
<|assistant|>
{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}

    {%- else %}
<|{{ m.role }}|>
{{ {'text': m.content} | tojson }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{% endif %}"""


def test_transformers_writes_the_same(tmp_path):
    """The library whose format this is, as judge: white space, loop controls, tojson, special tokens, absent tools."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": HARD, "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    form = load_chat_template(str(path))
    said = [("system", "be <kind>"), ("user", "\u732b 'a' \"b\""), ("assistant", " first "), ("user", "two")]
    turns = [Turn(*one) for one in said]
    messages = [{"role": role, "content": text} for role, text, _ in turns]

    def written(messages, cue):
        return judge.apply_chat_template(messages, chat_template=HARD, tokenize=False, add_generation_prompt=cue)

    assert form.prompt(turns) == written(messages, True)
    prompt, (answer,) = form.render(turns, ["gladly"])
    assert prompt + answer == written([*messages, {"role": "assistant", "content": "gladly"}], False)
    assert answer.startswith("gladly</s>") and form.end == "</s>"


def test_talking_with_a_chat_template(script, base_model, vocab_file, tmp_path, monkeypatch):
    """Each turn is asked with the whole conversation as the template writes it, not as a piece of it."""
    (tmp_path / "chat.jinja").write_text(JINJA)
    lines, asked = iter(["hello", "again", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    generate = Sampler.generate

    def spy(sampler, prompts, params, *, state, **more):
        asked.append((sampler.tokenizer.decode(prompts[0]), state))
        found = generate(sampler, prompts, params, state=state, **more)
        found[0].text = "yes"
        return found

    monkeypatch.setattr(Sampler, "generate", spy)
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--template", tmp_path / "chat.jinja"]
    status, _, err = script(chat.main, *words, "--max_tokens", 3)
    assert status == 0, err
    first = "<|user|>hello<|end|>\n<|assistant|>"
    assert asked == [(first, None), (f"{first}yes<|end|>\n<|user|>again<|end|>\n<|assistant|>", None)]


def test_sampling_with_a_chat_template(script, words, tmp_path, monkeypatch):
    """The model is asked in the template's words and stops at its closing mark, not at a blank line."""
    asked = []

    def answer(sampler, queue, **more):
        while queue:
            request = queue.popleft()
            asked.append((sampler.tokenizer.decode(request.prompt), request.params.stop_texts))
            yield Finished(request, 0, Completion([1], [0.0], finished=True, text="so be it"))

    monkeypatch.setattr(Sampler, "stream", answer)
    (tmp_path / "chat.jinja").write_text(JINJA)
    source = write_csv(tmp_path / "in.csv", ROWS[:1])
    run = ["--input_csv", source, "--output_csv", tmp_path / "out.csv", *words, "--template", tmp_path / "chat.jinja"]
    assert script(rejects.main, *run)[0] == 0
    assert asked == [("<|user|>say one<|end|>\n<|assistant|>", ("<|end|>",))]
    assert read_csv(tmp_path / "out.csv")[1][2] == "so be it"
    write_csv(source, ROWS[:2])
    (tmp_path / "chat.jinja").write_text(JINJA.replace("<|end|>", "<|stop|>"))  # the same name, another template
    status, _, err = script(rejects.main, *run)
    assert status == 2 and "other settings: template" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for m in messages %}", "endfor"),
        ("always the same", "does not write"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_are_programs_of_strangers(tmp_path, text, said):
    """A downloaded template reaches nothing of this program; a broken one is one sentence with its name."""
    path = tmp_path / "chat.jinja"
    path.write_text(text)
    (tmp_path / "in.csv").write_text("prompt,chosen,reject\nHi,Hello.,Go.\n")
    with pytest.raises(ValueError, match=rf"--template .*chat\.jinja.*{said}"):
        prepare_pairs.main(
            [
                "--input_csv",
                str(tmp_path / "in.csv"),
                "--template",
                str(path),
                "--output_save",
                str(tmp_path / "a.save"),
            ]
        )
