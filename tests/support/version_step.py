"""One training step of a two-layer model of a version, compared with the same step in float64 on the CPU."""

import functools

import torch

from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.ops.judge import error
from tests.support.models import any_initial_tensors

LAYERS, WIDTH, VOCABULARY, HEAD = 2, 128, 300, 64


def start_tensors(version):
    """A model in which every tensor takes part: initial values with noise."""
    generator = torch.Generator().manual_seed(0)
    tensors = any_initial_tensors(version, LAYERS, WIDTH, VOCABULARY, HEAD, 0)
    return {
        name: x + torch.randn(x.shape, generator=generator) * (0.05 if x.dim() < 2 else 0.5 / max(x.shape) ** 0.5)
        for name, x in tensors.items()
    }


def step(version, device, dtype, backend):
    """Loss and gradients of one step over two packed documents of odd lengths."""
    tensors = start_tensors(version)
    model = RWKV(sizes_of(tensors), compute_dtype=dtype, wkv_backend=backend)
    model.load_state_dict({name: x for name, x in tensors.items() if name in model.state_dict()})
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)  # masters
    tokens = torch.randint(VOCABULARY, (1, 101), generator=torch.Generator().manual_seed(1)).to(device)
    hidden, _ = model(tokens[:, :-1], None, torch.tensor([0, 33, 100], device=device))
    loss = torch.nn.functional.cross_entropy(model.head(hidden)[0].to(torch.float32), tokens[0, 1:])
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None},
    }


@functools.cache
def exact_step(version):
    """The same by the plain loop in float64."""
    return step(version, torch.device("cpu"), torch.float64, "naive")


def step_errors(version, device, dtype, backend):
    """Tensor -> how far it is off; a gradient that is all but zero is judged by the size of the others."""
    values, exact = step(version, device, dtype, backend), exact_step(version)
    assert values.keys() == exact.keys()
    sizes = {name: float(x.square().mean().sqrt()) for name, x in exact.items()}
    floor = 1e-3 * max(sizes.values())
    return {name: error(values[name], x) * min(1.0, sizes[name] / floor) for name, x in exact.items()}
