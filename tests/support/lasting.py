"""Inputs of a recurrence whose states last for hundreds of tokens."""

import torch

from rwkv_rlhf.ops.judge import RECURRENCES


def lasting(op, inputs):
    """The same inputs with decays of about 0.996 a token: after 64 tokens three quarters of a state are left."""
    w = inputs[RECURRENCES[op].names.index("w")]
    with torch.no_grad():
        w.copy_((w - w.mean()) * 0.3 - 5.5)
    return inputs
