"""What the tests of kernels share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small tensors are slower on several threads, in the plain loop above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
