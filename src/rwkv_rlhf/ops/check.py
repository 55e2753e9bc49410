"""Run every kernel that this machine can build against the plain loop in float64: values, gradients, times.

Legend: B batch, T tokens, C width, H heads, N head size, V vocabulary.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops import elementwise, elementwise_naive, judge
from rwkv_rlhf.ops.backend import OPERATIONS
from rwkv_rlhf.ops.backends import backends_of, choose
from rwkv_rlhf.ops.logprob import row_grad_, row_stats
from rwkv_rlhf.ops.products import product
from rwkv_rlhf.precision import NAMES

SHAPE = (2, 130, 2, 64)  # B, T, H, N: two checkpoint intervals and a rest
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # bfloat16: what rounding inputs and outputs costs, and a margin
TRITON_LIMIT = 2e-4  # of float32: Triton's kernels cut the log decays of RWKV-5 and 6 at -10
REPEATS = 3
PLAIN_TOKENS = 13  # of the tokens, by which the plain loop is timed: each takes as long
Values = dict[str, Tensor]


class Case(NamedTuple):
    """Something that several backends compute: `run(inputs, backend)` on `make(dtype, device)`. `plain` inputs are
    those on which the plain form is timed, which takes `times` as long on all."""

    op: str
    name: str
    make: Callable[[torch.dtype, torch.device], list[Tensor]]
    run: Callable[[list[Tensor], str], Values]
    plain: Callable[[torch.dtype, torch.device], list[Tensor]] | None = None
    times: float = 1.0


class Finding(NamedTuple):
    """How one backend did: the tensor that is furthest off, by what, and the times of forward and backward."""

    case: str
    backend: str
    device: str
    dtype: torch.dtype
    worst: str = ""
    error: float = 0.0
    milliseconds: float = 0.0
    plain_milliseconds: float = 0.0
    refusal: str = ""  # why it cannot run here
    failure: str = ""  # why it broke although it should run

    @property
    def agrees(self) -> bool:
        """False for a disagreement or a failure; a backend that cannot run here is none."""
        return not self.failure and self.error <= self.limit

    @property
    def limit(self) -> float:
        """The largest error that counts as agreement."""
        return max(LIMITS[self.dtype], TRITON_LIMIT if self.backend == "triton" else 0.0)


def findings(devices: list[torch.device]) -> Iterator[Finding]:
    """One finding for each compiled backend of each operation, on each device and in each dtype."""
    for device in devices:
        for case in cases():
            for dtype in LIMITS:
                exact = functools.cache(functools.partial(reference, case, dtype))
                for backend in backends_of(case.op):
                    if backend != "naive" and (backend == "cpu") == (device.type == "cpu"):
                        yield examine(case, backend, device, dtype, exact)


def reference(case: Case, dtype: torch.dtype) -> Values:
    """The plain loop in float64 on the inputs of `dtype`, which are the same on every device."""
    made = case.make(dtype, torch.device("cpu"))
    return case.run([x.detach().double().requires_grad_() if x.is_floating_point() else x for x in made], "naive")


def examine(
    case: Case,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    exact: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Finding:
    """Compare one backend with the plain loop in float64 on the same inputs. exact: what gives its values; it is run
    where this is None."""
    about = Finding(case.name, backend, str(device), dtype)
    try:
        choose(case.op, device, dtype, SHAPE, backend)
    except ValueError as error:
        return about._replace(refusal=str(error).partition(f"{backend}: ")[2] or str(error))
    try:
        inputs = case.make(dtype, device)
        took, values = timed(lambda: case.run(inputs, backend), device)
        few = case.plain(dtype, device) if case.plain else inputs
        plain, _ = timed(lambda: case.run(few, "naive"), device, repeats=1)
        values = {name: x.cpu() for name, x in values.items()}
    except RuntimeError as error:  # after a fault on a GPU every further use of it fails, whatever asks
        return about._replace(failure=str(error).strip().partition("\n")[0])
    found = judge.errors(values, exact() if exact else reference(case, dtype))
    worst = max(found, key=lambda name: found[name])
    return about._replace(worst=worst, error=found[worst], milliseconds=took, plain_milliseconds=plain * case.times)


class Speed(NamedTuple):
    """How fast one backend runs a recurrence, forward and backward together, on an ordinary shape."""

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # B, T, H, N
    milliseconds: float

    @property
    def gigabytes(self) -> float:
        """GB/s of what must move at least: inputs, y, its gradient and the inputs' gradients, each once a pass."""
        tokens = len(judge.RECURRENCES[self.op].tokens)
        numbers = (3 * tokens + 2) * math.prod(self.shape)
        return numbers * self.dtype.itemsize / self.milliseconds / 1e6


TIMED = {"cpu": ((1, 256, 12, 64),), "cuda": ((1, 4096, 32, 64), (8, 4096, 32, 64))}  # by the type of device


def speeds(found: Sequence[Finding]) -> Iterator[Speed]:
    """The recurrences on ordinary shapes, by each backend that was found right."""
    for about in found:
        if about.case not in judge.RECURRENCES or about.refusal or not about.agrees:
            continue
        device = torch.device(about.device)
        for shape in TIMED[device.type]:
            inputs = _same_heads(about.case, shape, about.dtype, device)
            run = functools.partial(_recurrence, about.case, inputs, about.backend)
            took, _ = timed(run, device)
            yield Speed(about.case, about.backend, about.device, about.dtype, shape, took)


def chosen(devices: Sequence[torch.device]) -> str:
    """What "auto" uses for which operation, by device and dtype, in one line."""
    found = []
    for device in devices:
        for dtype in (*LIMITS, torch.float16):
            uses: dict[str, list[str]] = {}
            for op in OPERATIONS:
                uses.setdefault(choose(op, device, dtype, SHAPE)[0], []).append(op)
            text = ", ".join(f"{name} for {' '.join(ops)}" for name, ops in uses.items())
            found.append(f"{device} {NAMES[dtype]}: {next(iter(uses)) if len(uses) == 1 else text}")
    return "auto uses " + "; ".join(found)


def timed(run: Callable[[], Values], device: torch.device, repeats: int = REPEATS) -> tuple[float, Values]:
    """The shortest of `repeats` runs in milliseconds, and the result of the last."""
    best, values = float("inf"), {}
    for _ in range(repeats):
        began = time.perf_counter()
        values = run()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) * 1e3)
    return best, values


def cases() -> Iterator[Case]:
    """The recurrences, the element-wise groups, the rows of log-softmax and products."""
    for op in judge.RECURRENCES:
        few = (SHAPE[0], PLAIN_TOKENS, *SHAPE[2:])
        yield Case(
            op,
            op,
            functools.partial(_recurrence_inputs, op, SHAPE),
            functools.partial(_recurrence, op),
            functools.partial(_recurrence_inputs, op, few),
            SHAPE[1] / PLAIN_TOKENS,
        )
    for name in POINTWISE:
        yield Case("elementwise", name, functools.partial(_rows, name), functools.partial(_pointwise, name))
    yield Case("logprob", "logprob", _logits, _logprob)
    for name, rows in (("few rows", 7), ("many rows", 40)):
        yield Case("products", name, functools.partial(_operands, rows), _product)


def _recurrence_inputs(
    op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    return [*judge.make_inputs(op, shape, dtype, device), judge.make_state(op, shape[0], *shape[2:], device=device)]


def _same_heads(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Inputs of `shape` whose rows and heads are all the same: random numbers would take longer than what is timed."""
    batch, tokens, heads, size = shape
    recurrence, made = judge.RECURRENCES[op], []
    axes = [2] * len(recurrence.tokens) + [0] * len(recurrence.vectors) + [1]  # where heads lie, or channels
    for x, axis in zip(_recurrence_inputs(op, (1, tokens, 1, size), dtype, device), axes, strict=True):
        row = torch.cat([x.detach()] * heads, axis)
        made.append((torch.cat([row] * batch) if axis else row).requires_grad_())
    return made


def _recurrence(op: str, inputs: list[Tensor], backend: str) -> Values:
    return judge.results(op, inputs[:-1], inputs[-1], backend=backend)


BATCH, TOKENS, HEADS, SIZE = SHAPE
C = (HEADS * SIZE,)
X = (BATCH, TOKENS, *C)


class Pointwise(NamedTuple):
    """Shapes of the inputs (three axes or four: activations), the call, and its plain twin, which autograd knows."""

    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]


POINTWISE = {
    "token_mix": Pointwise(
        (X, (BATCH, *C), (6, *C)),
        lambda x, last, mixes, backend: elementwise.token_mix(x, last, None, mixes, backend),
        elementwise_naive.token_mix,
    ),
    "value_gate": Pointwise((X, X, C, X), elementwise.value_gate, elementwise_naive.value_gate),
    "delta_keys": Pointwise(
        (X, C, C, C, X),
        lambda k, k_k, k_a, a0, a12, backend: elementwise.delta_keys(k, k_k, k_a, a0, a12, HEADS, backend),
        lambda k, k_k, k_a, a0, a12: elementwise_naive.delta_keys(k, k_k, k_a, a0, a12, HEADS),
    ),
    "gated_norm": Pointwise(
        (SHAPE, X, X, X, (HEADS, SIZE), C, C, X), elementwise.gated_norm, elementwise_naive.gated_norm
    ),
    "relu_squared": Pointwise((X,), elementwise.relu_squared, elementwise_naive.relu_squared),
}


def _rows(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Activations in `dtype`, small vectors in float32."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator) for shape in POINTWISE[name].shapes]
    return [x.to(device, dtype if x.dim() > 2 else torch.float32).requires_grad_() for x in made]


def _pointwise(name: str, inputs: list[Tensor], backend: str) -> Values:
    group = POINTWISE[name]
    outputs = group.plain(*inputs) if backend == "naive" else group.run(*inputs, backend=backend)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.device, y.dtype) for y in outputs]
    # of one number: given the weights as gradients autograd would import sympy
    grads = torch.autograd.grad(torch.stack([(y * w).sum() for y, w in zip(outputs, weights)]).sum(), inputs)
    values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return values | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def _logits(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 1000, generator=generator) * 4
    return [logits.to(device, dtype), torch.randint(1000, (64,), generator=generator).to(device)]


def _logprob(inputs: list[Tensor], backend: str) -> Values:
    logits, targets = inputs
    found = row_stats(logits, targets, backend)
    share = torch.linspace(-1, 1, len(targets), dtype=found.lse.dtype, device=logits.device)
    d = row_grad_(logits.detach().clone(), targets, found.lse, share, share / 2, found.argmax, share / 4, backend)
    return {"lse": found.lse, "target logit": found.target_logit, "sum": found.logit_sum, "gradient": d}


def _operands(rows: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, *C), (96, *C))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _product(inputs: list[Tensor], backend: str) -> Values:
    x, weight = inputs
    return {"output": product(x, weight, backend=backend)}
