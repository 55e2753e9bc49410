"""A conversation: its commands by what they do, Ctrl+C and line editing through a pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest
import torch

from rwkv_rlhf.commands import chat
from rwkv_rlhf.generation.sampler import Sampler
from tests.support.files import jsonl, read_jsonl
from tests.support.processes import environment
from tests.support.source_files import ROOT

FIRST = "User: hello\n\nAssistant:"


@pytest.fixture
def talk(script, base_model, vocab_file, monkeypatch):
    """talk(*lines) types them and gives (stdout, what the model was asked: (text, with a state))."""

    def call(*lines, more=(), model=base_model):
        typed, asked = iter(lines), []
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
        generate = Sampler.generate

        def spy(sampler, prompts, params, **known):
            asked.append((sampler.tokenizer.decode(prompts[0]), known["state"] is not None))
            return generate(sampler, prompts, params, **known)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "generate", spy)
            words = ["--load_model", model, "--vocab_file", vocab_file, "--max_tokens", 6, "--strategy", "cpu fp32"]
            status, out, err = script(chat.main, *words, *more)
        assert status == 0, err
        return out, asked

    return call


def answers(out):
    """What was answered, each text that stands before the count of its tokens."""
    out = re.sub(r"^temperature \d\n", "", out, flags=re.M)  # what /temp says
    return re.findall(r"((?:.*\n)?.*)\n(?:\(cut.*\n|\(stopped\)\n)?\([\d,]+ tokens?, [\d.]+ tokens/s\)", out)


def test_settings_are_shown_and_tokens_counted(talk, base_model):
    """If this breaks, a person does not know which model, template and settings answer, and how fast."""
    out, _ = talk("hello", "/temp 0.5", "/set", "/quit")
    assert f"{base_model.stem}, cpu fp32, template world\ntemperature 1, top_p 0.7" in out
    assert "temperature 0.5, top_p 0.7" in out and re.search(r"\n\([1-6] tokens?, [\d.]+ tokens/s\)\n", out)


def test_undo_and_retry(talk):
    """If this breaks, a turn that was taken back is still in the model's state, or another try says the same."""
    _, asked = talk("hello", "/undo", "hello", "again", "/undo", "again", "/quit")
    assert asked[0] == asked[1] == (FIRST, False) and asked[2] == asked[3] and asked[2][1]
    out, asked = talk("hello", "/retry", "/retry", "/undo", "/undo", "/quit")
    assert asked == [(FIRST, False)] * 3 and "taken back: hello" in out and "there is no turn to take back" in out
    assert len({*answers(out)}) == 3


def test_the_system_text(talk):
    """If this breaks, the model is told something that it does not read, or forgets what was said before."""
    _, asked = talk("/system Be kind.", "hello", "/reset", "hello", "/system", "/reset", "hello", "/quit")
    told = "System: Be kind.\n\n" + FIRST
    assert [text for text, _ in asked] == [told, told, FIRST]
    _, asked = talk("hello", "/system Be kind.", "more", "/quit")
    assert asked[1][0].startswith("System: Be kind.\n\nUser: hello\n\nAssistant: ") and not asked[1][1]


def test_saved_and_loaded(talk, tmp_path):
    """If this breaks, a conversation cannot be gone on with, or is no data for training."""
    file, state = tmp_path / "talk.jsonl", tmp_path / "talk.safetensors"
    out, asked = talk("hello", f"/save {file}", f"/state save {state}", "more", "/quit")
    (line,) = read_jsonl(file)
    assert [one["role"] for one in line["messages"]] == ["user", "assistant"] and line["messages"][0][
        "content"
    ] == "hello"
    _, again = talk(f"/state load {state}", "more", "/quit")
    assert again == asked[1:] and again[0][1]
    jsonl(file, {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]})
    out, asked = talk(f"/load {file}", "more", "/quit")
    assert asked == [("User: hello\n\nAssistant: yes\n\nUser: more\n\nAssistant:", False)] and "2 turns loaded" in out


def test_another_model_and_template(talk, base_of):
    """If this breaks, /model or /template forgets the conversation, or writes it as the other one did."""
    other = base_of("x060")
    out, asked = talk("hello", f"/model {other}", "more", "/model none.pth", "/set", "/quit")
    assert "x060 listens now" in out and "none.pth" in out and asked[1][0].startswith("User: hello") and not asked[1][1]
    assert "\nx060, cpu fp32" in out
    _, asked = talk("/template g1", "hello", "/think off", "/reset", "hello", "/quit")
    assert [text for text, _ in asked] == [FIRST + " <think", FIRST + " <think>\n</think"]
    out, _ = talk("/think off", "/template none", "/think what", "/template g1h", "hello", "/quit")
    assert "the template world has no form for thinking" in out and "/template none is not known" in out
    assert "/think on, or /think off" in out
    out, _ = talk("/temp 0.5", "/template g1", "/think off", "/system Be kind.", "/reset", "/system", "/reset", "/quit")
    for told in ("temperature 0.5\n", "template g1; ", "an answer: off\n", "the system text stays\n", "is forgotten\n"):
        assert told in out  # or nobody knows whether it was heard


def test_two_models_answer(talk, base_of, base_model):
    """If this breaks, two models cannot be compared, or one reads what the other said."""
    other = base_of("x060")
    out, asked = talk("/temp 0", "hello", "more", "/undo", "more", "/quit", more=["--compare", other])
    assert "\n[x070]\n" in out and "\n[x060]\n" in out
    assert asked[:2] == [(FIRST, False)] * 2 and asked[2] != asked[3] and asked[2:4] == asked[4:6]
    alone, known = talk("/temp 0", "hello", "more", "/quit", model=other)
    assert known[1] == asked[3] and {*answers(alone)} <= {*answers(out.replace("[x060]\n", ""))}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/save", "/save needs the name of a file"),
        ("/load none.jsonl", "none.jsonl: cannot be read"),
        ("/state save x.safetensors", "there is no state yet"),
        ("/state what", "/state save FILE.safetensors, or /state load"),
        ("/retry", "there is no turn to take back"),
        ("/nothing", "there is no command /nothing (/help lists them)"),
        ("/retri", "did you mean /retry?"),
        ("/help", "/retry "),
        ("/temp -1", "/temp -1.0: must be at least 0"),
        ("/top_p", "/top_p '': expected a number"),
        ("/template", "/template "),
    ],
)
def test_mistakes_are_sentences(talk, line, said):
    """If this breaks, a typing error ends the conversation."""
    out, asked = talk(line, "hello", "/quit")
    assert said in out and asked == [(FIRST, False)]


def test_a_state_of_another_size_is_refused(talk, tmp_path, base_of):
    """If this breaks, a file of another model ends the conversation with a traceback, or is taken for a state."""
    state = tmp_path / "talk.safetensors"
    talk("hello", f"/state save {state}", "/quit")
    out, _ = talk(f"/state load {base_of('x070')}", "/quit")
    assert "is not a state of a conversation" in out
    out, _ = talk(f"/state load {state}", "/quit", model=base_of("x040"))
    assert "is the state of a model of another size" in out


def test_lines_go_on_behind_a_backslash(talk):
    """If this breaks, what has several lines cannot be typed without a terminal."""
    _, asked = talk("one\\", "two", "/quit")
    assert asked == [("User: one\ntwo\n\nAssistant:", False)]


# a new line is asked for: what is typed before that is read by the terminal's own rules
READY = r"\x1b\[\?2004h.*?>"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        place = environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR=1, COLUMNS=100)
        command = [sys.executable, *map(str, words)]
        settings = {"cwd": ROOT, "env": place, "stdin": slave, "stdout": slave, "stderr": slave}
        # its controlling terminal, so that Ctrl+C is a signal
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **settings
        )
        os.close(slave)
        self.seen = ""

    def wait(self, pattern, seconds=200):
        """Everything up to and with what the pattern means."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 1 << 16).decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text):
        os.write(self.master, text.encode())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(base_model, vocab_file, tmp_path):
    """If this breaks, Ctrl+C ends the program with all that was said, or line editing and history are gone."""
    tensors = torch.load(base_model, weights_only=True)
    tensors["head.weight"][[0, 11]] = 0  # a model that never ends an answer
    torch.save(tensors, tmp_path / "endless.pth")
    words = ["--load_model", tmp_path / "endless.pth", "--vocab_file", vocab_file, "--strategy", "cpu fp32"]
    history, saved = tmp_path / "history.txt", tmp_path / "talk.jsonl"
    chat = Terminal("chat.py", *words, "--temperature", 0, "--max_tokens", 200000, "--history", history)
    try:
        chat.wait("Ctrl.D leaves.*" + READY)
        chat.type("hexlo\x1b[D\x1b[D\x7fl\r")  # two steps to the left, the x is deleted, an l is typed
        chat.wait(".{2000}")
        chat.type("\x03")
        assert "Traceback" not in chat.wait(r"\(stopped\)\r\n\([\d,]+ tokens?, [\d.]+ tokens/s\)")
        chat.wait(READY)
        chat.type("/max 3\r")
        chat.wait(READY)
        chat.type("one\x1b\rtwo\r")  # Alt+Enter is a line break
        chat.wait(r"\(cut at /max 3\).*" + READY)
        chat.type(f"/save {saved}\r")
        chat.wait("saved: .*" + READY)
        chat.type("\x04")
        assert chat.process.wait(100) == 0
    finally:
        chat.process.kill()
        os.close(chat.master)
    (line,) = read_jsonl(saved)
    assert [one["content"] for one in line["messages"] if one["role"] == "user"] == ["hello", "one\ntwo"]
    assert len(line["messages"][1]["content"]) > 10 and "/max 3" in history.read_text()
