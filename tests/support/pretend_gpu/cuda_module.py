"""Stand-ins for what torch.cuda would do, and for torch.tensor, which makes its result without the dispatcher."""

from types import SimpleNamespace
from typing import Any

import torch

from tests.support.pretend_gpu.tensors import CUDA, DEVICE, PretendTensor, is_cuda

NAME = "a pretend GPU"
CAPABILITY = (7, 5)  # of a card that has neither bf16 nor Triton's kernels
make_tensor = torch.tensor


class Event:
    """A mark in the queue."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        """Every copy so far is before it."""

    def query(self) -> bool:
        """Never yet, as of a GPU that is busy."""
        return False

    def synchronize(self) -> None:
        """Wait for it."""
        DEVICE.wait("an event is waited for")


class Stream:
    """The only queue."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None:
        """Wait until it is empty."""
        DEVICE.wait("a stream is waited for")

    def wait_stream(self, other: Any) -> None:
        """Nothing to do: there is one."""

    wait_event = wait_stream


class Inside:
    """torch.cuda.device(...): there is one."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """As torch.tensor."""
    if not is_cuda(device):
        return make_tensor(data, *args, device=device, **kwargs)
    DEVICE.wait("a copy to the device that is waited for")
    return PretendTensor(make_tensor(data, *args, **kwargs))


def no_numbers(device: Any = None) -> torch.Tensor:
    """The state of a generator that nobody draws from: the numbers are drawn on the host."""
    return torch.zeros(16, dtype=torch.uint8)


def install() -> None:
    """Put them in place, for the rest of the process."""
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=24 << 30, multi_processor_count=1
    )
    stand_ins = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *_: False,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": no_numbers,
        "get_rng_state_all": lambda: [no_numbers()],
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (20 << 30, 24 << 30),
        "synchronize": lambda device=None: DEVICE.wait("the device is waited for"),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": Inside,
        "device": Inside,
        "Event": Event,
        "Stream": Stream,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes asks while it is imported
    torch.tensor = tensor
    # a module that moves gets new parameters: the data of a pretend tensor cannot be exchanged
    torch.__future__.set_overwrite_module_params_on_conversion(True)
