"""The vocabulary of the World models, which takes a while to read."""

import pytest

from rwkv_rlhf.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def world():
    """The tokenizer of the released models; nobody changes it."""
    return load_tokenizer(65536)
