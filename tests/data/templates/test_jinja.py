"""Chat templates are programs of strangers: they stay in their sandbox, their process, their time and memory."""

import json
import os
import subprocess
import sys
import threading

import pytest

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates import jinja as chat_template
from rwkv_rlhf.data.templates.jinja import load_chat_template, written_at
from rwkv_rlhf.data.templates.jinja_process import compiled
from rwkv_rlhf.data.templates.named import find_templates
from tests.fuzzing.mutators import EVIL, SENTINEL, SLOW
from tests.support.processes import PROGRAMS
from tests.support.source_files import PACKAGE


def template(folder, text):
    """A template that writes conversations as it should, behind `text`."""
    path = folder / "chat.jinja"
    path.write_text(text + "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}", encoding="utf-8")
    return path


TURNS = [Turn("user", "Hi"), Turn("assistant", "Hello")]


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
        found[number] = [form.history([Turn("user", f"{number} {n}")]) for n in range(30)]

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [f"<user>{number} {n}\n" for n in range(30)] for number in range(4)}


def test_tojson_takes_what_templates_give_it():
    """If this breaks, a template of Hugging Face that says how it wants its JSON is refused as broken."""
    said = ("tojson", "tojson(ensure_ascii=False)", "tojson(ensure_ascii=True)", "tojson(indent=0)")
    text = " ".join(f"{{{{ x|{word} }}}}" for word in said)
    plain, also, escaped, lines = compiled(text).render(x=["\u732b<"]).split(" ")
    assert plain == also == '["\u732b<"]' and escaped == '["\\u732b<"]' and lines == '[\n"\u732b<"\n]'


def test_a_resumed_run_is_of_its_first_day(tmp_path):
    """If this breaks, a template that writes the date makes another corpus of the same rows the day after."""
    path = str(template(tmp_path, "{{ strftime_now('%d %b %Y') }} "))
    with written_at("2020-02-01T10:00:00"):
        assert find_templates(path)[0].template.history(TURNS).startswith("01 Feb 2020 <user>")
    assert "2020" not in find_templates(path)[0].template.history(TURNS)
