"""What the program never does, whatever a file says: run its code, leave its sandbox, or talk to anybody."""

import ast
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rwkv_rlhf.data.templates import jinja as chat_template
from rwkv_rlhf.data.templates.jinja import load_chat_template
from tests.fuzzing.mutators import EVIL, SENTINEL, SLOW
from tests.support.files import VOCAB
from tests.support.processes import PROGRAMS, environment
from tests.support.source_files import OTHERS, PACKAGE, ROOT, SCRIPTS, SRC, TESTS, name_of, nodes_of

# calls that build objects from bytes by running what the bytes say; by the whole name or its last part
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "Unpickler", "marshal.loads", "shelve.open", "yaml.load"),
    *("unsafe_load", "full_load", "joblib.load", "os.system", "os.popen", "torch.jit.load", "torch.package"),
    # these read pickles of their own: a run's own folder is read by our own code
    *("load_checkpoint", "load_from_checkpoint", "get_fp32_state_dict_from_zero_checkpoint"),
}


def calls(*groups):
    """(place, name, keywords) of every call in the files."""
    for path in itertools.chain(*groups):
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                said = {word.arg: word.value for word in node.keywords}
                yield f"{name_of(path)}:{node.lineno}", ast.unparse(node.func), said


def tensors_only(said):
    return "weights_only" in said and ast.unparse(said["weights_only"]) == "True"


def test_torch_load_reads_tensors_only():
    """If this breaks, a downloaded checkpoint can run a program; said in each call, whatever torch's default is."""
    found = [(place, said) for place, name, said in calls(SRC, SCRIPTS, OTHERS, TESTS) if name.endswith("torch.load")]
    unsafe = [place for place, said in found if not tensors_only(said)]
    assert found and not unsafe


def test_no_file_is_run():
    """If this breaks, a data file, vocabulary or checkpoint can run a program."""
    found = []
    for place, name, said in calls(SRC, SCRIPTS, OTHERS):
        if name in FORBIDDEN or name.split(".")[-1] in FORBIDDEN - {"eval"}:
            found.append(f"{place}: {name}")
        for flag in ("allow_pickle", "shell", "trust_remote_code"):
            if flag in said and ast.unparse(said[flag]) not in ("False", "None", "0"):
                found.append(f"{place}: {name} with {flag}")
        if name.endswith(".fit") and "ckpt_path" in said and not tensors_only(said):
            found.append(f"{place}: {name}")
    assert not found, "\n".join(found)


def template(folder, text):
    """A template that writes conversations as it should, behind `text`."""
    path = folder / "chat.jinja"
    path.write_text(text + "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}", encoding="utf-8")
    return path


TURNS = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize("text", EVIL)
def test_a_template_gets_nowhere(tmp_path, monkeypatch, text):
    """Out of the sandbox, into files, beyond its memory: a sentence, or text that holds nothing of this program."""
    monkeypatch.chdir(tmp_path)
    try:
        said = load_chat_template.__wrapped__(template(tmp_path, text)).history(TURNS)
    except ValueError as error:
        assert "template" in str(error) and len(str(error)) < 1000
    else:
        assert len(said) < 2_000_000
        for secret in ("<class", "<module", "function", "builtins", "root:"):
            assert secret not in said, said[:300]
    assert not (tmp_path / SENTINEL).exists() and os.listdir(tmp_path) == ["chat.jinja"]


@pytest.mark.parametrize("text", [SLOW[0], "{{ ('a' * 99999).replace('a', 'b' * 99999) | length }}"])
def test_a_template_that_never_ends_is_ended(tmp_path, monkeypatch, text):
    """Loops in Python and loops in C alike; the next template works."""
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    path = template(tmp_path, text)
    with pytest.raises(ValueError, match=r"chat\.jinja.*(takes more than 2 seconds|needs more than)"):
        load_chat_template.__wrapped__(path)
    monkeypatch.undo()
    assert load_chat_template.__wrapped__(template(tmp_path, "")).history(TURNS) == "<user>Hi\n<assistant>Hello\n"


def test_a_template_that_leaves_its_sandbox_finds_nothing(tmp_path):
    """Were there a way out of Jinja: no file can be opened and none written by the process that runs templates."""
    tries = ("open('/etc/passwd').read()", "open('new', 'w')", "__import__('socket').socket()")
    lines = [
        json.dumps({"source": "{{ cycler.__init__.__globals__['__builtins__']." + words + " }}", "values": {}})
        for words in (tries[0], tries[1], "__import__('os').open('/etc/passwd', 0)", tries[2], "len('four')")
    ]
    words = [sys.executable, "-P", str(PROGRAMS / "escaped_template.py"), str(PACKAGE / "data" / "templates")]
    done = subprocess.run(
        words, input="\n".join(lines) + "\n", capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(answer) for answer in answers] == [["failed"]] * 4 + [["text"]], answers
    assert answers[-1] == {"text": "4"} and "Too many open files" in answers[0]["failed"]
    assert not list(tmp_path.iterdir())


def test_templates_of_several_threads_do_not_mix(tmp_path):
    """If this breaks, two conversations that are written at once get each other's text."""
    form = load_chat_template.__wrapped__(template(tmp_path, ""))
    found = {}

    def write(number):
        found[number] = [form.history([("user", f"{number} {n}")]) for n in range(30)]

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [f"<user>{number} {n}\n" for n in range(30)] for number in range(4)}


def everything(folder, base, vocab, pairs, texts):
    """Each program, one after the other."""
    model, words = f"--load_model {base}", f"--vocab_file {vocab}"
    (folder / "empty.csv").write_text("prompt,chosen,reject\nsay a,gladly,\nsay b,of course,\n")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_bytes(texts.read_bytes())
    (folder / "prompts.jsonl").write_text('{"prompt": "say a"}\n')
    template(folder, "")
    # a folder of such a name once made a trainer upload its checkpoints to somebody
    run = f"{folder}/14b-run1/world/7b"
    small = f"{model} {words} --precision fp32 --quant 0 --ctx_len 64 --epoch_steps 2 --epoch_count 1 --micro_bsz 2"
    lines = {
        "rlhf_generate_reject_csv": f"{model} {words} --input_csv {folder}/empty.csv --output_csv {folder}/full.csv"
        " --strategy 'cpu fp32' --max_tokens 4",
        "PrepareOrpoDataset": f"--input_csv {pairs} --output_save {folder}/orpo.save --target_pair_count 8 {words}"
        f" --vocab_size {VOCAB} --template {folder}/chat.jinja",
        "rlhf_dpo_generate_save": f"{model} {words} --input_csv {pairs} --output_save {folder}/dpo.save"
        " --target_pair_count 8 --strategy 'cpu fp32'",
        "sft_generate_h5": f"--input {folder}/texts --output_h5 {folder}/sft.h5 {words} --vocab_size {VOCAB}",
        "distillation_generate_h5": f"{model} {words} --input {folder}/texts --output_h5 {folder}/kd.h5 --top_k 4"
        " --strategy 'cpu fp32'",
        "make_binidx": f"--input {texts} --output {folder}/corpus --vocab_size {VOCAB} {words}",
        "train": f"{small} --dpo 1 --peft lora --rlhf_train_file {folder}/dpo.save --proj_dir {run}",
        "merge": f"--base_model {base} --lora_checkpoint {run}/rwkv-0.pth --output {folder}/merged.pth",
        "chat": f"--load_model {folder}/merged.pth {words} --prompt_file {folder}/prompts.jsonl"
        f" --output {folder}/answers.jsonl --max_tokens 3 --strategy 'cpu fp32'",
    }
    return [(name, shlex.split(line)) for name, line in lines.items()]


def test_nobody_is_called(tmp_path, base_model, vocab_file, pairs_csv, text_jsonl):
    """If this breaks, a training or a script tells somebody about itself, or fetches something, unasked."""
    commands = everything(tmp_path, base_model, vocab_file, pairs_csv, text_jsonl)
    watched = environment(first_path=PROGRAMS.parent / "no_network", REACHED=tmp_path / "reached.txt")

    def call(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=watched, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    probe = call("-c", "import socket; socket.create_connection(('example.invalid', 80))")
    assert "no connection in this test" in probe.stderr and (tmp_path / "reached.txt").read_text()
    (tmp_path / "reached.txt").unlink()
    done = call(PROGRAMS / "every_command.py", json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "answers.jsonl").read_text()
    assert not (tmp_path / "reached.txt").exists(), (tmp_path / "reached.txt").read_text()


def test_two_runs_at_once_share_data_and_caches(tmp_path, base_model, vocab_file, pairs_csv):
    """If this breaks, a second run on the same machine, data and kernels' cache damages the first one or itself."""
    small = ["--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--quant", 0]
    small += ["--ctx_len", 64, "--epoch_steps", 2, "--epoch_count", 1, "--micro_bsz", 2, "--dpo", 1, "--peft", "lora"]
    small += ["--rlhf_train_file", pairs_csv, "--dpo_beta", 0.1]
    before = {path: path.read_bytes() for path in (base_model, vocab_file, pairs_csv)}
    beside = {path: sorted(os.listdir(path.parent)) for path in before}

    def start(name):
        words = [sys.executable, ROOT / "train.py", *small, "--proj_dir", tmp_path / name]
        return subprocess.Popen(
            list(map(str, words)), env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )

    first, second = start("one"), start("two")
    errors = [run.communicate(timeout=500)[1] for run in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    one, two = (torch.load(tmp_path / name / "rwkv-0.pth", weights_only=True) for name in ("one", "two"))
    assert one and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {path: path.read_bytes() for path in before} == before
    assert {path: sorted(os.listdir(path.parent)) for path in before} == beside
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]  # no file of a fixed name where both were started


def test_the_paths_of_this_test_exist():
    """If this breaks, the rules above look at nothing."""
    assert {"train.py", "chat.py"} <= {name_of(path) for path in SCRIPTS} and len(SRC) > 50
    assert Path(chat_template.__file__).with_name("jinja_process.py").is_file()
