"""Turns of a conversation as every template gets them."""

from rwkv_rlhf.data.conversation import normalise


def test_normalise():
    """A blank line inside a turn would end it early in every template."""
    assert normalise("  a\r\n\r\n \t\n\nb\rc \n") == "a\nb\nc"
    assert normalise("a\n b") == "a\n b"
    assert normalise("\n\n") == ""
