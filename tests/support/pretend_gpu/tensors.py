"""Tensors that say cuda:0 and keep their numbers in host memory. What would make the host wait for a GPU is counted.

Every operation on such a tensor, or that makes one, passes `run`, which does it on the host. It refuses what a GPU
would refuse: tensors of two devices in one operation. A copy to pinned memory that is not waited for arrives only when
something waits: whoever reads it before finds NaN.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import rwkv_rlhf

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(rwkv_rlhf.__file__).parent) + "/"
# operations whose result has a size, or is a number, that only the device knows
ASKING = {
    "_local_scalar_dense": "a number is read",
    "equal": "two tensors are compared",
    "nonzero": "places are counted",
    "masked_select": "places are counted",
    "_unique2": "values are counted",
    "unique_dim": "values are counted",
    "unique_consecutive": "values are counted",
    "bincount": "values are counted",
}


class MixedDevices(RuntimeError):
    """One operation on tensors of two devices."""


class Wait(NamedTuple):
    """The host waits for the device: why, and which line of the program (or of a library below it) makes it wait."""

    what: str
    file: str  # below the package; "" for a library that no file of the program called
    function: str
    line: int

    @property
    def place(self) -> str:
        """As tests/support/allowed_waits.py has it."""
        return f"{self.file}:{self.function}"


class Device:
    """What happened on the pretend GPU."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.underway: list[Callable[[], object]] = []  # copies to the host that nobody has waited for

    def wait(self, what: str) -> None:
        """The host waits until the queue is empty."""
        self.waits.append(Wait(what, *_line()))
        self.arrive()

    def arrive(self) -> None:
        """What was copied to the host is there."""
        for copy in self.underway:
            copy()
        self.underway.clear()


DEVICE = Device()


def _line() -> tuple[str, str, int]:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            function = re.sub(r"\.<\w+>", "", code.co_qualname)  # without what is inside of it
            return code.co_filename.removeprefix(PACKAGE), function, frame.f_lineno
        frame = frame.f_back
    return "", "", 0


class PretendTensor(torch.Tensor):
    """A tensor of the pretend GPU; `host` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"on the pretend GPU: {self.host}"

    def tolist(self) -> Any:  # PyTorch's own passes no dispatcher
        DEVICE.wait("numbers are read")
        return self.host.tolist()


class PretendGpu(TorchDispatchMode):
    """Inside the block, tensors that are asked for on cuda are pretend ones."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument names the GPU."""
    return device is not None and torch.device(device).type == "cuda"


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, on the host."""
    flat = list(_tensors((args, tuple(kwargs.values()))))
    ours = [x for x in flat if isinstance(x, PretendTensor)]
    device = kwargs.get("device")
    name = function.__name__.partition(".")[0]
    if not ours and not is_cuda(device):
        return function(*args, **kwargs)
    if name in ("copy_", "_to_copy"):
        return _copy(name, function, args, kwargs)
    _refuse_mixed(name, function, args, flat)
    _ask(name, args, kwargs, flat)
    if is_cuda(device):
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    found = _on_host(function, args, kwargs)
    if device is not None and not is_cuda(device):
        return found
    known = {id(x.host): x for x in ours}
    made = lambda x: known[id(x)] if id(x) in known else PretendTensor(x)  # noqa: E731
    return made(found) if isinstance(found, Tensor) else tree_map_only(Tensor, made, found)


def _on_host(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*_hosts(args), **{key: _hosts(value) for key, value in kwargs.items()})


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors among arguments, which may hold sequences of them (faster than PyTorch's walk over any tree)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _hosts(value: Any) -> Any:
    """Arguments with the host's tensor for each pretend one."""
    if isinstance(value, PretendTensor):
        return value.host
    return type(value)(map(_hosts, value)) if type(value) in (list, tuple) else value


def _refuse_mixed(name: str, function: Any, args: tuple[Any, ...], flat: list[Tensor]) -> None:
    """As PyTorch: numbers of the host are welcome everywhere, its index tensors where a tensor is indexed."""
    strangers = [x for x in flat if x.is_cpu and x.dim()]
    if name in ("index", "index_put", "index_put_"):
        indices = [x for x in args[1] if isinstance(x, Tensor) and x.is_cpu]
        if indices:
            DEVICE.wait("indices of the host are copied")
        strangers = [x for x in strangers if not any(x is index for index in indices)]
    if strangers:
        file, where, line = _line()
        raise MixedDevices(
            f"{function} of cuda and cpu tensors {[tuple(x.shape) for x in strangers]}, {file}:{line} {where}"
        )


def _ask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Tensor]) -> None:
    """Count what a GPU must answer before the host can go on."""
    if name in ASKING and flat:
        DEVICE.wait(ASKING[name])
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        DEVICE.wait("repeats are added up")
    if name == "segment_reduce" and not kwargs.get("unsafe"):
        DEVICE.wait("lengths are checked")
    if name in ("index", "index_put", "index_put_"):
        masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
        fills = name != "index" and args[2].numel() == 1
        if masks and not fills:
            DEVICE.wait("places are counted")


def _copy(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Between the host and the device, or on either. Not waited for: non_blocking, to or from pinned memory."""
    source = args[1] if name == "copy_" else args[0]
    from_gpu = isinstance(source, PretendTensor)
    device = kwargs.get("device")
    to_gpu = (
        isinstance(args[0], PretendTensor) if name == "copy_" else (from_gpu if device is None else is_cuda(device))
    )
    lasting = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    plain = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    if from_gpu and not to_gpu:
        return _to_host(name, function, args, plain, bool(lasting))
    if to_gpu and not from_gpu and source.numel():
        if source.is_pinned() and lasting:
            DEVICE.arrive()  # copies are made in the order in which they are queued
        else:
            DEVICE.wait("a copy to the device" + ("" if lasting else " that is waited for"))
    found = _on_host(function, args[:2] if name == "copy_" else args, plain)
    if name == "copy_":
        return args[0]
    return PretendTensor(found) if to_gpu else found


def _to_host(name: str, function: Any, args: tuple[Any, ...], plain: dict[str, Any], lasting: bool) -> Tensor:
    if name == "_to_copy":
        found = _on_host(function, args, plain)
        target = torch.empty_like(found, pin_memory=lasting)
    else:
        target, found = args[0], torch.empty_like(args[0]).copy_(args[1].host)
    if lasting and target.is_pinned():
        target.fill_(float("nan") if target.is_floating_point() else 0)
        DEVICE.underway.append(lambda: target.copy_(found))
    else:
        if found.numel():
            DEVICE.wait("a copy to the host")
        target.copy_(found)
    return target
