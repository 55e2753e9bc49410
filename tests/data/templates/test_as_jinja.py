"""The built-in templates as Jinja, for programs that have no other: run in the sandbox, they write the same text."""

import pytest

from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.templates.jinja import JinjaTemplate, load_chat_template
from rwkv_rlhf.data.templates.template import PLAIN, TEMPLATES

TURNS = [Turn("system", "Be kind."), Turn("user", "Hi\nthere"), Turn("assistant", "It's {{ x }}"), Turn("user", "Bye")]
WRITTEN = {share.template: name for name, shares in TEMPLATES.items() for share in shares if share.template != PLAIN}


@pytest.mark.parametrize("template", WRITTEN, ids=[f"{name}-{t.user}" for t, name in WRITTEN.items()])
def test_a_template_writes_in_jinja_what_it_writes_here(template):
    """If this breaks, an exported model is asked in another form than it was trained with."""
    jinja = JinjaTemplate(source=template.as_jinja())
    assert jinja.history(TURNS) == template.history(TURNS)
    assert jinja.prompt(TURNS) == template.prompt(TURNS)


@pytest.mark.parametrize("text", ["  a \r\n\r\n b\rc\n \t\n\n\n d  ", "one\n", "\n\n x"])
def test_a_text_is_normalised_in_jinja_as_it_is_here(text):
    """A blank line inside a turn would end it."""
    (share,) = TEMPLATES["world"]
    jinja = JinjaTemplate(source=share.template.as_jinja())
    assert jinja.prompt([Turn("user", text)]) == share.template.prompt([Turn("user", normalise(text))])


def test_bare_text_has_no_chat_template():
    """If this breaks, a model that was trained on plain text pretends to be a chat model."""
    assert PLAIN.as_jinja() == ""


def test_a_template_from_a_file_brings_its_own_marks(tmp_path):
    """If this breaks, its special tokens become those of the program that it is exported to."""
    path = tmp_path / "tokenizer_config.json"
    source = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    path.write_text(f'{{"chat_template": "{source}", "bos_token": "<s>", "eos_token": {{"content": "<e\'>"}}}}')
    written = load_chat_template(path).as_jinja()
    other = JinjaTemplate(source=written, special=(("bos_token", "no"), ("eos_token", "no")))
    assert other.history(TURNS[:2]) == "<s>Be kind.<e'>Hi\nthere<e'>"
