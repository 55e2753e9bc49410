"""How the recurrences are called: what is kept and converted, and errors that name the argument at fault."""

import pytest
import torch

from rwkv_rlhf.ops import cpu, recurrence
from rwkv_rlhf.ops.build import BuildError
from rwkv_rlhf.ops.judge import RECURRENCES, make_inputs, make_state

ROOM = 32  # head size of the inputs here


@pytest.fixture(params=list(RECURRENCES))
def op(request):
    """Each recurrence."""
    return request.param


def plain_inputs(op, batch=1, tokens=3, heads=2):
    return [x.detach() for x in make_inputs(op, (batch, tokens, heads, ROOM))]


def test_only_what_is_asked_for_is_kept(op):
    """Inference keeps nothing for backward; a frozen input gets no gradient."""
    run, inputs, state = RECURRENCES[op].function, make_inputs(op, (1, 4, 1, ROOM)), make_state(op, 1, 1, ROOM)
    with torch.no_grad():
        assert not run(*inputs, state=state)[0].requires_grad
    inputs[0] = inputs[0].detach()
    y, _ = run(*inputs, state=state)
    y.sum().backward()
    assert inputs[0].grad is None and inputs[1].grad is not None and state.grad is not None


def test_inference_with_parameters_that_train_writes_no_checkpoints(op, monkeypatch):
    """If this breaks, sampling and the first pass of a long context write a state every 64 tokens for nobody."""
    backend_of(op)
    asked, real = [], recurrence.kernel

    class Noting:
        def __init__(self, *which):
            self.real = real(*which)

        def forward(self, inputs, state, starts, keep):
            asked.append(keep)
            return self.real.forward(inputs, state, starts, keep)

    monkeypatch.setattr(recurrence, "kernel", Noting)
    run, inputs = RECURRENCES[op].function, make_inputs(op, (1, 4, 1, ROOM))
    run(*inputs, state=make_state(op, 1, 1, ROOM), backend="cpu")
    with torch.no_grad():
        run(*inputs, state=make_state(op, 1, 1, ROOM), backend="cpu")
    assert asked == [True, False]


def test_kernel_keeps_little_for_backward(op):
    """A float32 state every 64 tokens and, for wkv7, one number per token and channel: long contexts rely on it."""
    inputs, kept = make_inputs(op, (1, 128, 1, 64)), {}
    own = {x.untyped_storage().data_ptr() for x in inputs}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        RECURRENCES[op].function(*inputs, backend=backend_of(op))
    extra = sum(size for pointer, size in kept.items() if pointer not in own)
    per_element = {"wkv4": 3 * 4 / 64, "wkv5": 4, "wkv6": 4, "wkv7": 8}[op]
    assert extra <= 128 * 64 * per_element + 64  # 64: starts


def size_of(op):
    """The head size that the kernel of `op` is compiled for."""
    return 0 if op == "wkv4" else ROOM


def backend_of(op):
    """ "cpu", or a skip where it cannot be built."""
    try:
        cpu.recurrence(op, size_of(op))
    except BuildError as error:
        pytest.skip(f"the kernel cannot be built here: {error}")
    return "cpu"


def test_state_of_another_dtype_is_converted_and_receives_its_gradient(op):
    """If this breaks, a learnt state in bf16 is refused or does not learn."""
    inputs = make_inputs(op, (1, 4, 1, ROOM))
    state = make_state(op, 1, 1, ROOM, torch.bfloat16)
    y, last = RECURRENCES[op].function(*inputs, state=state)
    y.sum().backward()
    assert last.dtype == torch.float32 and state.grad.dtype == torch.bfloat16


def test_vectors_of_another_dtype_are_converted_and_receive_their_gradient():
    """A bfloat16 model hands over its parameters as they are."""
    for op in ("wkv4", "wkv5", "wkv6"):
        *inputs, u = make_inputs(op, (1, 4, 1, ROOM), torch.bfloat16)
        u = u.detach().bfloat16().requires_grad_()
        y, _ = RECURRENCES[op].function(*inputs, u)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and u.grad.dtype == torch.bfloat16


def test_operator_refuses_offsets_outside_its_memory(op):
    """Called by hand with wrong segment starts the operator must raise, not read foreign memory."""
    backend_of(op)
    inputs = plain_inputs(op, tokens=4, heads=1)
    for starts in ([0, 5], [0, 3], [1, 4], [0, 4, 2, 4], [0, -1, 4]):
        state = make_state(op, len(starts) - 1, 1, ROOM).detach()
        with pytest.raises(ValueError, match="starts must rise"):
            cpu.recurrence(op, size_of(op)).forward(inputs, state, starts, True)


def test_operator_refuses_tensors_that_do_not_fit(op):
    """A missing input, one too short, a state of too few rows, an upstream gradient of another dtype or shape."""
    backend_of(op)
    inputs, starts = plain_inputs(op, tokens=4, heads=1), [0, 4]
    state = make_state(op, 1, 1, ROOM).detach()
    run, back = cpu.recurrence(op, size_of(op)).forward, cpu.recurrence(op, size_of(op)).backward
    with pytest.raises(ValueError, match=f"{len(inputs) - 1} inputs, but it needs {len(inputs)}"):
        run(inputs[:-1], state, starts, True)
    with pytest.raises(ValueError, match=f"input {len(inputs) - 1} is"):
        run([*inputs[:-1], inputs[-1][..., :-1]], state, starts, True)
    with pytest.raises(ValueError, match="input 1 is"):
        run([inputs[0], inputs[1].double(), *inputs[2:]], state, starts, True)
    with pytest.raises(ValueError, match="does not fit 1 rows"):
        run(inputs, state[:0], starts, True)
    y, last, *kept = run(inputs, state, starts, True)
    with pytest.raises(ValueError, match="the gradient of y is"):
        back(inputs, kept, y.double(), last)
    with pytest.raises(ValueError, match="the gradient of the final state is"):
        back(inputs, kept, y, last[..., :-1])
    with pytest.raises(ValueError, match="kept nothing"):
        back(inputs, [], y, last)


def cut(x):
    return x[:, :2]


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (1, cut, "{name} has shape"),
        (1, torch.Tensor.bfloat16, "{name} is torch.bfloat16"),
        (0, lambda x: x[0], "{name} must have shape"),
        (0, torch.Tensor.int, "{name} must be bfloat16"),
        (1, lambda x: x.to("meta"), "{name} is on meta"),
    ],
)
def test_wrong_input_is_named(op, which, change, message):
    """If this breaks, an argument that does not fit reads memory that is not its own, or is an error without a name."""
    inputs = plain_inputs(op)
    inputs[which] = change(inputs[which])
    with pytest.raises(ValueError, match=message.format(name=RECURRENCES[op].names[which])):
        RECURRENCES[op].function(*inputs)


@pytest.mark.parametrize("op", ["wkv4", "wkv5", "wkv6"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u[..., :-1], "u has shape"),
        (lambda u: u.long(), "u must be a floating-point"),
        (lambda u: u.to("meta"), "u is on meta"),
    ],
)
def test_wrong_vector_is_named(op, change, message):
    """If this breaks, a vector that does not fit reads memory that is not its own."""
    *inputs, u = plain_inputs(op)
    with pytest.raises(ValueError, match=message):
        RECURRENCES[op].function(*inputs, change(u))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.tensor([0, 3], dtype=torch.int32), "starts must be int64"),
        (torch.tensor([0, 2]), "starts must rise from 0 to the 3 tokens"),
        (torch.tensor([0, 3, 1, 3]), "starts must rise"),
        (torch.tensor([0]), "starts must be int64 of shape"),
    ],
)
def test_wrong_starts_are_named(op, starts, message):
    """If this breaks, damaged starts of a packed row write outside of it."""
    with pytest.raises(ValueError, match=message):
        RECURRENCES[op].function(*plain_inputs(op), starts=starts)


def test_wrong_state_or_backend_is_named(op):
    """If this breaks, a state that does not fit is read as one, or a backend's name that is none is taken."""
    run, inputs, state = RECURRENCES[op].function, plain_inputs(op), make_state(op, 1, 2, ROOM).detach()
    with pytest.raises(ValueError, match="state has shape"):
        run(*inputs, state=state[..., :-1])
    with pytest.raises(ValueError, match="state must be a floating-point"):
        run(*inputs, state=state.long())
    with pytest.raises(ValueError, match="state has shape"):
        run(*inputs, starts=torch.tensor([0, 1, 3]), state=state)
    with pytest.raises(ValueError, match=f"{op} has no backend 'fast'"):
        run(*inputs, backend="fast")


def test_packed_rows_need_batch_size_one(op):
    """If this breaks, starts are applied to the first of several rows."""
    with pytest.raises(ValueError, match="starts needs packed rows"):
        RECURRENCES[op].function(*plain_inputs(op, batch=2), starts=torch.tensor([0, 3]))
