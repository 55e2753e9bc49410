"""--template: the name of a built-in template, or a file with a Jinja one."""

import random

from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.templates.jinja import load_chat_template
from rwkv_rlhf.data.templates.template import TEMPLATES, Share, Template
from rwkv_rlhf.data.tokenizer import Tokenizer

FILES = (".jinja", ".jinja2", ".j2", ".json")  # what --template may name beside the built-in ones
TEMPLATE_SEED = 100  # the tradition's seed for drawing templates


def find_templates(name: str) -> tuple[Share, ...]:
    """What `name` stands for: an entry of TEMPLATES, or the template of a file (.jinja, tokenizer_config.json).

    Raises ValueError that lists the legal names, or says what is wrong with the file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.lower().endswith(FILES):
        return (Share(1.0, load_chat_template(name)),)
    raise ValueError(
        f"--template {name} is not known; one of {', '.join(TEMPLATES)}, or a chat template ({', '.join(FILES)})"
    )


def check_template(name: str) -> None:
    """Raises ValueError as `find_templates`. Nothing is kept: what a file says may depend on the run's time."""
    find_templates(name)
    load_chat_template.cache_clear()


def say_plain_marks(name: str, tokenizer: Tokenizer, report: DataReport) -> None:
    """Notes which special tokens of a template the vocabulary does not have: they are trained as the text they are."""
    marks = [mark for share in find_templates(name) for mark in share.template.marks(tokenizer)]
    if marks:
        some = ", ".join(dict.fromkeys(marks))
        report.notice(f"--template {name}: {some}: plain text in this vocabulary, which has no such token")


def draw_template(name: str, rng: random.Random) -> Template:
    """The template for one row; `mixed` draws 80/10/10, one draw a row, from `rng`."""
    shares = find_templates(name)
    if len(shares) == 1:
        return shares[0].template
    point = rng.random()
    for share, template in shares:
        point -= share
        if point < 0:
            return template
    return shares[-1].template
