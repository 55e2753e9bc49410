"""rlhf_generate_reject_csv.py and chat.py: what they write, keep, repair and refuse."""

import csv
import datetime
import decimal
import io
import json

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model, trainable
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.commands import chat, generate_rejects, prepare_pairs, sft_h5
from rwkv_rlhf.commands import generate_rejects as rejects
from rwkv_rlhf.data.opening import open_pairs
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation import rejects as room
from rwkv_rlhf.generation.rows import Completion, Finished
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.precision import parse_strategy
from tests.support.files import ROWS, VOCAB, read_csv, read_jsonl, write_csv


@pytest.fixture
def words(base_model, vocab_file, tmp_path):
    """The flags of a small run, without the input."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--output_csv", tmp_path / "out.csv"),
        *("--strategy", "cpu fp32", "--max_tokens", 12, "--batch_size", 2),
    ]


def test_empty_rejects_are_filled_and_others_stay(script, words, tmp_path, caplog):
    """The user's own rejects must survive; every other row gets a sampled one, in input order."""
    caplog.set_level("INFO")
    status, printed, err = script(rejects.main, "--input_csv", write_csv(tmp_path / "in.csv", ROWS), *words)
    assert status == 0, err
    out = read_csv(tmp_path / "out.csv")
    shown = printed.splitlines()
    assert len(shown) == 6 and shown[2:4] == [f"prompt: {ROWS[1][0]}", "  reject: no, two"]
    assert out[0] == ["prompt", "chosen", "reject"] and [row[:2] for row in out[1:]] == [row[:2] for row in ROWS]
    assert out[2][2] == "no, two"
    assert all(row[2] and row[2] != row[1] for row in out[1:])
    assert "4 rejects sampled, 1 kept" in caplog.text


def test_what_is_written_can_be_read(script, words, vocab_file, tmp_path, monkeypatch):
    """A model that is not trained yet says NUL bytes, over which every reader stops."""
    sample = Sampler.stream

    def nul(*args, **settings):
        for one in sample(*args, **settings):
            one.completion.text = "a\0b" + one.completion.text
            yield one

    monkeypatch.setattr(Sampler, "stream", nul)
    assert script(rejects.main, "--input_csv", write_csv(tmp_path / "in.csv", ROWS), *words)[0] == 0
    pairs = open_pairs(tmp_path / "out.csv", load_tokenizer(VOCAB, vocab_file))
    assert len(pairs) == 5 and read_csv(tmp_path / "out.csv")[1][2].startswith("ab")


def test_the_command_of_the_seeds_runs_without_a_gpu(script, words, tmp_path, caplog):
    """--strategy 'cuda fp16' is in every old script; on a CPU it runs with one notice, under both script names."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = write_csv(tmp_path / "in.csv", ROWS[:1])
    caplog.set_level("INFO")
    status, _, _ = script(generate_rejects.main, "--input_csv", source, *words, "--strategy", "cuda fp16")
    assert status == 0 and caplog.text.count("no GPU") == 1


def test_overwrite_replaces_and_reject_may_be_absent(script, words, tmp_path):
    """--overwrite 1 replaces rejects; a file with only prompt and chosen gets the column; others are kept."""
    source = write_csv(tmp_path / "in.csv", ROWS)
    assert script(rejects.main, "--input_csv", source, *words, "--overwrite", "1")[0] == 0
    assert read_csv(tmp_path / "out.csv")[2][2] != "no, two"
    two = write_csv(tmp_path / "two.csv", [["p", "c", "me"]], ("Prompt", "CHOSEN", "author"))
    assert script(rejects.main, "--input_csv", two, *words, "--output_csv", tmp_path / "two_out.csv")[0] == 0
    out = read_csv(tmp_path / "two_out.csv")
    assert out[0] == ["prompt", "chosen", "author", "reject"] and out[1][2] == "me" and out[1][3]


@pytest.mark.parametrize("cut", ["between rows", "in a row", "in the header"])
def test_a_stopped_run_goes_on_and_ends_the_same(script, words, tmp_path, cut, caplog):
    """Rows already written are kept, a half-written last row is written again, the end equals an unbroken run."""
    source = write_csv(tmp_path / "in.csv", ROWS)
    assert script(rejects.main, "--input_csv", source, *words)[0] == 0
    out = tmp_path / "out.csv"
    whole = out.read_bytes()
    rows = read_csv(out)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows[:4])
    third_ends = len(buffer.getvalue().encode())
    assert whole.startswith(buffer.getvalue().encode())
    place = {"between rows": third_ends, "in a row": third_ends - 4, "in the header": 9}[cut]
    out.write_bytes(whole[:place])
    caplog.set_level("INFO")
    status, _, _ = script(rejects.main, "--input_csv", source, *words)
    assert status == 0 and out.read_bytes() == whole
    assert ("3 rows were kept from an earlier run" in caplog.text) == (cut == "between rows")
    assert ("cut off" in caplog.text) == (cut != "between rows")


def test_a_finished_output_is_left_alone_and_said_so(script, words, tmp_path, caplog):
    """Nothing is sampled twice by accident; --overwrite 1 begins again."""
    caplog.set_level("INFO")
    source = write_csv(tmp_path / "in.csv", ROWS)
    for _ in range(2):
        assert script(rejects.main, "--input_csv", source, *words)[0] == 0
    before = (tmp_path / "out.csv").read_bytes()
    assert "had every row already" in caplog.text
    assert script(rejects.main, "--input_csv", source, *words, "--overwrite", 1, "--seed", 9)[0] == 0
    assert (tmp_path / "out.csv").read_bytes() != before


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_run_that_breaks_loses_nothing(script, words, tmp_path, monkeypatch, caplog, order):
    """Ctrl+C after three answers, in whatever order they came: exit status 130, the next call samples the fourth only,
    and the end is that of an unbroken run."""
    source, sample, out = write_csv(tmp_path / "in.csv", ROWS), room.sample_rows, tmp_path / "out.csv"
    assert script(rejects.main, "--input_csv", source, *words)[0] == 0
    whole = out.read_bytes()
    out.unlink()

    def stopped(*arguments):
        answers = sorted(sample(*arguments))
        yield from (answers[place] for place in order[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "sample_rows", stopped)
    assert script(rejects.main, "--input_csv", source, *words)[0] == 130
    assert whole.startswith(out.read_bytes())
    monkeypatch.setattr(room, "sample_rows", sample)
    caplog.set_level("INFO")
    assert script(rejects.main, "--input_csv", source, *words)[0] == 0
    assert out.read_bytes() == whole and "1 rejects sampled" in caplog.text
    assert not list(tmp_path.glob("*.part-*"))


def test_answers_of_other_settings_are_not_taken_up(script, words, tmp_path, monkeypatch, caplog):
    """What a stopped run kept beside its output is of no use with another seed."""
    source, sample = write_csv(tmp_path / "in.csv", ROWS), room.sample_rows

    def stopped(*arguments):
        yield sorted(sample(*arguments))[3]
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "sample_rows", stopped)
    assert script(rejects.main, "--input_csv", source, *words)[0] == 130
    assert list(tmp_path.glob("*.part-0"))
    monkeypatch.setattr(room, "sample_rows", sample)
    (tmp_path / "out.csv").unlink()
    caplog.set_level("INFO")
    assert script(rejects.main, "--input_csv", source, *words, "--seed", 5)[0] == 0
    assert "4 rejects sampled" in caplog.text


def test_the_output_of_another_file_is_not_touched(script, words, tmp_path):
    """Mixing rows of two inputs in one output would be silent damage."""
    out = write_csv(tmp_path / "out.csv", [["other prompt", "other", "x"]])
    before = out.read_bytes()
    status, _, err = script(rejects.main, "--input_csv", write_csv(tmp_path / "in.csv", ROWS), *words)
    assert status == 2 and "row 1" in err and out.read_bytes() == before


def test_an_answer_equal_to_chosen_is_sampled_again_then_left_empty(words, tmp_path):
    """A pair of equal answers teaches nothing: other tries, then an empty cell that is counted and named."""
    seen = []

    class Parrot(Sampler):
        def stream(self, queue, *, at_once):
            while queue:
                request = queue.popleft()
                seen.append((request.key, request.seed, round(request.params.top_p, 2)))
                said = " gladly: one\n" if request.key[0] else " "
                yield Finished(request, 0, Completion([1], [0.0], finished=True, text=said))

    columns, tasks = room.read_tasks(write_csv(tmp_path / "in.csv", [["p", "x", ""], ROWS[0]]), "world")
    parrot = Parrot(None, load_tokenizer(VOCAB, words[3]))
    output = room.RejectFile(tmp_path / "out.csv", columns)
    tally = room.fill(parrot, tasks, output, SamplingParams(top_p=0.3), tries=3)
    assert [row[2] for row in read_csv(tmp_path / "out.csv")[1:]] == ["", ""]
    assert tally.empty == [1, 2] and tally.sampled == 0 and "left empty" in " ".join(tally.lines())
    assert len({seed for _, seed, _ in seen}) == 6
    assert {(attempt, top_p) for (_, attempt), _, top_p in seen} == {(0, 0.3), (1, 0.5), (2, 0.7)}


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([["a", "b"]], ("prompt", "answer"), "chosen is missing"),
        (
            [*ROWS, ["six", "gladly", ""], ["seven", "", ""]],
            ("prompt", "chosen", "reject"),
            "(row 7): the answer chosen",
        ),
        ([], ("prompt", "chosen", "reject"), "no row"),
    ],
)
def test_a_bad_input_is_one_sentence_and_no_output(script, words, tmp_path, rows, header, said):
    """File, row and reason, status 2, nothing written."""
    status, _, err = script(rejects.main, "--input_csv", write_csv(tmp_path / "in.csv", rows, header), *words)
    assert status == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "out.csv").exists()


def test_the_input_is_never_the_output(script, words, tmp_path):
    """A stopped run would destroy the input."""
    source = write_csv(tmp_path / "out.csv", ROWS)
    status, _, err = script(rejects.main, "--input_csv", source, *words)
    assert status == 2 and "--output_csv" in err and read_csv(source)[1:] == ROWS


@pytest.mark.parametrize("text", ["tpu fp32", "cuda int3", "cpu fp32 more", ""])
def test_unknown_strategies_are_refused(text):
    """With the legal words in the sentence."""
    with pytest.raises(ValueError, match="fp16, bf16, fp32, int8, nf4"):
        parse_strategy(text)


def test_a_cpu_computes_in_fp32_unless_bf16_is_asked_for():
    """16-bit products are slow or missing on many CPUs."""
    if not torch.cuda.is_available():
        assert [parse_strategy(text)[:2] for text in ("auto", "cuda fp16", "cpu fp16", "cuda bf16", "cpu")] == [
            ("cpu", torch.float32),
            ("cpu", torch.float32),
            ("cpu", torch.float32),
            ("cpu", torch.bfloat16),
            ("cpu", torch.float32),
        ]


def ask(script, base_model, vocab_file, tmp_path, *more, lines=('{"prompt": "say one"}', '{"prompt": "say: two"}')):
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return script(
        chat.main,
        *("--load_model", base_model, "--vocab_file", vocab_file, "--prompt_file", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "--max_tokens", 10, *more),
    )


def test_chat_answers_a_file_with_tokens_and_their_probabilities(script, base_model, vocab_file, tmp_path):
    """prompt, answer, tokens, logprobs: greedy ids and log-probabilities as one plain pass gives them."""
    status, _, err = ask(script, base_model, vocab_file, tmp_path, "--temperature", 0)
    assert status == 0, err
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert [line["prompt"] for line in lines] == ["say one", "say: two"]
    letters, model = load_tokenizer(VOCAB, str(vocab_file)), load_model(base_model, BuildOptions(torch.float32))[0]
    for line in lines:
        assert set(line) == {"prompt", "answer", "tokens", "logprobs"}
        prompt = letters.encode(f"User: {line['prompt']}\n\nAssistant:")
        with torch.no_grad():
            hidden, _ = model(torch.tensor([prompt + line["tokens"][:-1]]))
            logp = torch.log_softmax(model.head(hidden[0]), -1)[len(prompt) - 1 :]
        assert logp.argmax(1).tolist() == line["tokens"]
        assert line["logprobs"] == pytest.approx(logp.amax(1).tolist(), abs=1e-4)
        assert line["answer"] == letters.decode(line["tokens"]).split("\n\n")[0].strip()


def test_chat_samples_repeatably(script, base_model, vocab_file, tmp_path):
    """The same seed gives the same file, in batches of any size."""
    files = []
    for size, seed in ((1, 1), (2, 1), (2, 2)):
        assert ask(script, base_model, vocab_file, tmp_path, "--batch_size", size, "--seed", seed)[0] == 0
        files.append([line["tokens"] for line in read_jsonl(tmp_path / "out.jsonl")])
    assert files[0] == files[1] != files[2]


def test_chat_goes_on_with_the_answers_of_a_stopped_run(script, base_model, vocab_file, tmp_path, monkeypatch, caplog):
    """A night of answers is not lost because of the last one; of other settings nothing is taken up."""
    lines = [json.dumps({"prompt": f"say {n}"}) for n in range(5)]
    assert ask(script, base_model, vocab_file, tmp_path, lines=lines)[0] == 0
    whole, stream = read_jsonl(tmp_path / "out.jsonl"), Sampler.stream
    (tmp_path / "out.jsonl").unlink()

    def stopped(self, queue, **how):
        yield from (one for one, _ in zip(stream(self, queue, **how), range(3)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "stream", stopped)
    assert ask(script, base_model, vocab_file, tmp_path, "--batch_size", 1, lines=lines)[0] == 130
    monkeypatch.setattr(Sampler, "stream", stream)
    assert not (tmp_path / "out.jsonl").exists()
    caplog.set_level("INFO")
    for more, taken in ((("--seed", 7), 0), ((), 3)):
        left = (tmp_path / "out.jsonl.part-0").read_bytes()
        caplog.clear()
        assert ask(script, base_model, vocab_file, tmp_path, *more, lines=lines)[0] == 0
        assert (f"{taken} answers are there" in caplog.text) == bool(taken)
        assert not list(tmp_path.glob("*.part-*"))
        (tmp_path / "out.jsonl.part-0").write_bytes(left)
    assert [line["tokens"] for line in read_jsonl(tmp_path / "out.jsonl")] == [line["tokens"] for line in whole]


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"prompt": ""}', "[]", '{"prompt": "x"'])
def test_chat_names_the_line_of_a_bad_prompt(script, base_model, vocab_file, tmp_path, line):
    """File and line, status 2, no output file."""
    status, _, err = ask(script, base_model, vocab_file, tmp_path, lines=('{"prompt": "ok"}', line))
    assert status == 2 and "in.jsonl:2" in err and not (tmp_path / "out.jsonl").exists()


def test_chat_needs_both_files(script, base_model):
    """An output without prompts would be a silent no-op."""
    status, _, err = script(chat.main, "--load_model", base_model, "--output", "x.jsonl")
    assert status == 2 and "--prompt_file" in err


def test_chat_takes_the_scaling_of_an_adapter_without_a_sidecar(script, base_model, vocab_file, tmp_path):
    """Adapters of older programs have none: without the flags they could not be tried at all."""
    plan = make_plan("lora", 2, rank=4, alpha=8.0, lr_init=1e-4, lr_final=1e-5)
    model, _ = load_model(base_model, BuildOptions(torch.float32, plan=plan))
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(0.1 if "lora_" in name else 0.0)
    adapter = tmp_path / "old.pth"
    write_tensors({name: parameter.detach() for name, parameter in trainable(model).items()}, adapter)
    found = {}
    for words in (("--lora_scaling", 2), ("--lora_alpha", 8), ("--lora_scaling", 0)):
        more = ["--load_adapter", adapter, *words, "--temperature", 0, "--strategy", "cpu fp32"]
        status, _, err = ask(script, base_model, vocab_file, tmp_path, *more)
        assert status == 0, err
        found[words] = [line["logprobs"] for line in read_jsonl(tmp_path / "out.jsonl")]
    one, two, none = found.values()
    assert one == two != none
    status, _, err = ask(script, base_model, vocab_file, tmp_path, "--load_adapter", adapter)
    assert status == 2 and "no sidecar" in err and "--lora_scaling (alpha / rank) or --lora_alpha" in err
    status, _, err = ask(script, base_model, vocab_file, tmp_path, "--lora_alpha", 8)
    assert status == 2 and "need --load_adapter" in err


def test_talking_streams_answers_and_keeps_the_conversation(script, base_model, vocab_file, monkeypatch):
    """Commands work, answers come, the second turn knows the first, /reset forgets it."""
    lines = iter(["/temp 0", "/max 4", "hello", "again", "/reset", "hello", "/max x", "/what", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []
    generate = Sampler.generate

    def spy(sampler, prompts, params, **more):
        asked.append((prompts[0], more["state"] is None, params.temperature))
        return generate(sampler, prompts, params, **more)

    monkeypatch.setattr(Sampler, "generate", spy)
    status, out, err = script(chat.main, "--load_model", base_model, "--vocab_file", vocab_file)
    assert status == 0, err
    assert [fresh for _, fresh, _ in asked] == [True, False, True] and asked[0][0] == asked[2][0]
    assert len(asked[1][0]) > len("User: again\n\nAssistant:") and asked[0][2] == 0
    assert "there is no command /what (/help lists them)" in out


def test_values_typed_in_a_conversation_are_checked(script, base_model, vocab_file, monkeypatch):
    """If this breaks, a typing error ends the conversation, or the model answers for ever; a cut answer looks whole."""
    lines = iter(["/temp nan", "/top_p 7", "/max 0", "/max x", "/temp 0", "/max 2", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, out, err = script(chat.main, "--load_model", base_model, "--vocab_file", vocab_file)
    assert status == 0, err
    said = out.splitlines()
    for sentence in ("/temp nan: must be", "/top_p 7.0: must be", "/max 0: must be"):
        assert [line for line in said if line.startswith(sentence)], out
    assert "/max 'x': expected a whole number" in said and "(cut at /max 2)" in said


def test_json_lines_are_utf8(script, base_model, vocab_file, tmp_path):
    """Prompts in any language come back as they were."""
    line = json.dumps({"prompt": "\u732b?"}, ensure_ascii=False)
    assert ask(script, base_model, vocab_file, tmp_path, lines=(line,))[0] == 0
    assert read_jsonl(tmp_path / "out.jsonl")[0]["prompt"] == "\u732b?"


def test_foreign_columns_of_parquet_pass_as_text(script, words, tmp_path):
    """If this breaks, a published set with a date in it stops the sampler after its first batch is paid for."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "prompt": ["say one", "say two"],
        "chosen": ["one", "two"],
        "when": [datetime.datetime(2026, 1, 2, 3, 4), None],
        "day": [datetime.date(2026, 1, 2), None],
        "price": [decimal.Decimal("1.50"), None],
        "raw": [b"abc", b"\xff"],
        "tags": [["a", "b"], []],
        "by": [{"name": "x", "at": datetime.time(1, 2)}, None],
        "nothing": pyarrow.nulls(2),
        "score": [float("nan"), 1.0],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    for name in ("out.csv", "out.jsonl"):
        files = ("--input_csv", tmp_path / "in.parquet", "--output_csv", tmp_path / name)
        status, _, err = script(rejects.main, *words, *files)
        assert status == 0, err
    one, two = read_jsonl(tmp_path / "out.jsonl")
    assert (one["when"], one["day"], one["price"]) == ("2026-01-02T03:04:00", "2026-01-02", "1.50")
    assert (one["raw"], two["raw"], one["by"]) == ("abc", "ff", {"name": "x", "at": "01:02:00"})
    assert (one["tags"], one["score"], two["nothing"]) == (["a", "b"], None, None)
    assert read_csv(tmp_path / "out.csv")[1][2:7] == ["2026-01-02T03:04:00", "2026-01-02", "1.50", "abc", '["a", "b"]']


def test_a_name_that_lies_is_refused(script, words, tmp_path):
    """If this breaks, `--output_csv out.parquet` is a CSV that nobody can open under that name."""
    source = write_csv(tmp_path / "in.csv", ROWS)
    status, _, err = script(rejects.main, "--input_csv", source, *words, "--output_csv", tmp_path / "out.parquet")
    assert status == 2 and "no parquet; give a name that ends in .csv or .jsonl" in err
    words = ["--input_csv", source, "--vocab_size", VOCAB, "--output_save"]
    status, _, err = script(prepare_pairs.main, *words, tmp_path / "out.csv")
    assert status == 2 and "give a name that ends in .save" in err
    words = ["--input", source, "--output_parquet", tmp_path / "out.parquet"]
    status, _, err = script(sft_h5.main, *words)
    assert status == 2 and ".h5" in err
