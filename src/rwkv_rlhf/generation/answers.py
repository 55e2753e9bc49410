"""From sampled text to the text of an answer."""

from __future__ import annotations


def after_cue(cue: str, text: str) -> str:
    """Sampled text without what the cue of the g1 template left open, and without NUL bytes.

    Readers take those for a sign of another encoding, and would refuse a file that holds them.
    """
    if cue.endswith("</think"):
        text = text.removeprefix(">")
    elif cue.endswith("<think"):
        text = "<think" + text
    return text.replace("\0", "")
