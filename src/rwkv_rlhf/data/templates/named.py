"""A template by its name: one of those that are built in, or a file."""

import random

from rwkv_rlhf.data.templates.builtin import TEMPLATES, Form
from rwkv_rlhf.data.templates.jinja import load_chat_template

FILES = (".jinja", ".jinja2", ".j2", ".json")  # what --template may name beside the built-in ones


def forms_of(name: str) -> tuple[tuple[float, Form], ...]:
    """(share, form) pairs of a template: a name of TEMPLATES, or a file (.jinja, tokenizer_config.json).

    Raises ValueError that lists the legal names, or says what is wrong with the file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.lower().endswith(FILES):
        return ((1.0, load_chat_template(name)),)
    raise ValueError(
        f"--template {name} is not known; one of {', '.join(TEMPLATES)}, or a chat template ({', '.join(FILES)})"
    )


def check_template(name: str) -> str:
    """`name` itself; ValueError when `forms_of` does not know it."""
    forms_of(name)
    return name


def draw_form(name: str, rng: random.Random) -> Form:
    """The form for one row; `mixed` draws 80/10/10, one draw a row, from `rng` (the tradition's seed is 100)."""
    forms = forms_of(name)
    if len(forms) == 1:
        return forms[0][1]
    point = rng.random()
    for share, form in forms:
        point -= share
        if point < 0:
            return form
    return forms[-1][1]
