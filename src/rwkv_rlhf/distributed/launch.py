"""From one command to several processes: who started them, which rank this one is, and how they find each other.

torchrun and srun start every process themselves and say so in environment variables. Without them the process that the
user started is the first of its machine and starts the others with the same command. Either way every process knows the
same things about itself (`RankInfo`), and the work begins when all of them are connected.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.watchdog import Watchdog
from rwkv_rlhf.host_cores import host_cores
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import trains
from rwkv_rlhf.settings.surroundings import threads_typed

log = logging.getLogger(__name__)

Variables = Mapping[str, str]
SIOCGIFADDR = 0x8915  # Linux: the address of an interface
SPARE = 3.0  # minutes after --timeout until the library that moves tensors raises an error too
STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID")  # srun sets them, sbatch does not
WAITING = 10.0  # seconds after which a rank says whom it waits for
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which a person types


class RankInfo(NamedTuple):
    """One process among those that train: its rank of `world`, and of `local_world` on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = ""  # who started the processes; "" = this program

    @property
    def node(self) -> int:
        """The number of its machine."""
        return self.rank // self.local_world


def by_torchrun(variables: Variables) -> RankInfo | None:
    """What torchrun's variables (or our own first process, in the same ones) say of this process."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in variables for name in needed):
        return None
    rank, world, local, local_world = (_number(name, variables[name]) for name in needed[:4])
    port = _number("MASTER_PORT", variables["MASTER_PORT"])
    return RankInfo(rank, world, local, local_world, variables["MASTER_ADDR"], port, "torchrun")


def by_slurm(variables: Variables) -> RankInfo | None:
    """What srun says of this process; None outside of a job step of several tasks."""
    tasks = variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS", "1")
    needed = ("SLURM_PROCID", "SLURM_LOCALID")
    typed = variables.get("SLURM_JOB_NAME") in INTERACTIVE
    if typed or _number("SLURM_NTASKS", tasks) < 2 or any(name not in variables for name in needed):
        return None
    if not any(name in variables for name in STEP):  # the batch script itself: nobody started the other tasks
        log.warning(
            "SLURM gave %s tasks, but srun did not start this process: it runs alone; put srun before it", tasks
        )
        return None
    world = _number("SLURM_NTASKS", tasks)
    nodes = _number("SLURM_NNODES", variables.get("SLURM_STEP_NUM_NODES") or variables.get("SLURM_NNODES", "1"))
    if nodes < 1 or world % nodes:
        raise ValueError(f"SLURM started {world} tasks on {nodes} machines: every machine must run equally many")
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "127.0.0.1")
    address = variables.get("MASTER_ADDR") or _first_machine(names)
    port = variables.get("MASTER_PORT") or str(
        15000 + int(re.sub(r"\D", "", variables.get("SLURM_JOB_ID", ""))[-4:] or 0)
    )
    rank, local = (_number(name, variables[name]) for name in needed)
    return RankInfo(rank, world, local, world // nodes, address, _number("MASTER_PORT", port), "srun")


def _first_machine(names: str) -> str:
    """The first of SLURM's list of machines, such as node[07-11]."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment  # slow, and only wanted under srun

    return SLURMEnvironment.resolve_root_node_address(names)


LAUNCHERS: dict[str, Callable[[Variables], RankInfo | None]] = {"torchrun": by_torchrun, "srun": by_slurm}


def rank_info_of(config: Config, variables: Variables) -> RankInfo:
    """The rank of this process. Raises ValueError where the launcher's numbers and the flags disagree."""
    for find in LAUNCHERS.values():
        info = find(variables)
        if info is not None:
            _check_numbers(info)
            _check_flags(config, info)
            return info
    nodes, local = config.num_nodes, config.devices
    node = _number("NODE_RANK", variables.get("NODE_RANK", "0"))
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if nodes > 1 and missing:
        raise ValueError(
            f"{{num_nodes}} {nodes} needs the variables NODE_RANK (0 to {nodes - 1}, another on each machine), "
            f"MASTER_ADDR and MASTER_PORT (of machine 0); {', '.join(missing)} is not set. torchrun and srun set them"
        )
    if not 0 <= node < nodes:
        raise ValueError(f"NODE_RANK {node}: {{num_nodes}} {nodes} has machines 0 to {nodes - 1}")
    if nodes == 1:
        return RankInfo(0, local, 0, local, port=_free_port() if local > 1 else 0)
    port = _number("MASTER_PORT", variables["MASTER_PORT"])
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT {port}: must be from 1 to 65535")
    return RankInfo(node * local, nodes * local, 0, local, variables["MASTER_ADDR"], port)


def _check_numbers(info: RankInfo) -> None:
    """Raises ValueError for numbers of a launcher that cannot be: left over in a shell, or set by hand."""
    whole = 0 < info.local_world <= info.world and info.world % info.local_world == 0
    if not (
        whole and 0 <= info.rank < info.world and 0 <= info.local_rank < info.local_world and 0 <= info.port < 1 << 16
    ):
        raise ValueError(
            f"the variables of {info.launcher} say rank {info.rank} of {info.world} (WORLD_SIZE), {info.local_rank} of "
            f"{info.local_world} on its machine (LOCAL_WORLD_SIZE), port {info.port}: that cannot be; unset RANK, "
            "WORLD_SIZE and their like if nothing started this process with them"
        )


def _check_flags(config: Config, info: RankInfo) -> None:
    found = {"devices": info.local_world, "num_nodes": info.world // info.local_world}
    for name, number in found.items():
        if name in config.given and getattr(config, name) != number:
            raise ValueError(
                f"{{{name}}} {getattr(config, name)}, but {info.launcher} started {info.world} processes, "
                f"{info.local_world} on each machine: give {{{name}}} {number} or leave it out"
            )


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the variable {name} is {text!r}, expected a whole number") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_others(info: RankInfo, words: Sequence[str]) -> dict[int, subprocess.Popen[bytes]]:
    """The other processes of this machine, by rank: the same command, with its rank in torchrun's variables."""
    started = {}
    for local in range(1, info.local_world):
        rank = info.rank + local
        told = {
            "RANK": rank,
            "WORLD_SIZE": info.world,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": info.local_world,
            "MASTER_ADDR": info.address,
            "MASTER_PORT": info.port,
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # when another process ends it would draw stack traces
        }
        variables = os.environ | {name: str(value) for name, value in told.items()}
        started[rank] = subprocess.Popen([sys.executable, *words], env=variables, stdin=subprocess.DEVNULL)
    return started


def takes_several(config: Config) -> bool:
    """Whether the command is a training run, the only one that several processes share."""
    return trains(config) and not config.dry_run


ALONE = RankInfo(0, 1, 0, 1)
_current: ContextVar[RankInfo] = ContextVar("the rank of this process", default=ALONE)


def rank_info() -> RankInfo:
    """The rank of this process."""
    return _current.get()


@contextmanager
def launched(config: Config, words: Sequence[str]) -> Iterator[Config | None]:
    """Inside the block all processes of the run are connected; gives the Config with the numbers of this machine.

    words: the script and its command line, for the processes that have to be started. Gives None to a process that has
    nothing to do, because the command is no training run. A rank that fails in the block ends all others, with one
    sentence. Raises ValueError where flags, launcher and machine do not fit together.
    """
    before, alone = dict(os.environ), _current.set(_current.get())
    try:
        with _connected(config, words) as config_here:
            yield config_here
    finally:  # DeepSpeed and Lightning leave their variables behind, which processes started later would believe
        os.environ.clear()
        os.environ.update(before)
        _current.reset(alone)


@contextmanager
def _connected(config: Config, words: Sequence[str]) -> Iterator[Config | None]:
    info = rank_info_of(config, os.environ)
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"  # DeepSpeed would look for itself, and say so
    if info.world == 1:
        yield config
        return
    if not takes_several(config):
        yield None if info.rank else config
        return
    config = dataclasses.replace(
        config,
        devices=info.local_world,
        num_nodes=info.world // info.local_world,
        enable_progress_bar=config.enable_progress_bar and info.rank == 0,
    )
    backend = _take_device(config, info)
    if info.rank:
        logging.getLogger().setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"rank {info.rank}: %(message)s"))
    _current.set(info)
    others = {} if info.launcher else start_others(info, words)
    parent = info.node * info.local_world if info.local_rank else None
    with Watchdog(info.rank, info.world, others, config.timeout, parent=parent) as watch:
        _connect(info, backend, config.timeout)
        watch.begin(info.address, info.port)
        yield config


def _take_device(config: Config, info: RankInfo) -> str:
    """Takes this rank's GPU, or its share of the cores; returns the backend that moves tensors between ranks."""
    gpus = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    if not gpus:
        if not threads_typed():
            torch.set_num_threads(max(1, host_cores() // info.local_world))
        if info.world > info.local_world and (name := interface_towards(info.address)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        return "gloo"
    if info.local_world > gpus:
        raise ValueError(f"{{devices}} {info.local_world}: this machine shows {gpus} GPUs")
    torch.cuda.set_device(info.local_rank)
    return "nccl"


def interface_towards(address: str) -> str:
    """The network interface from which `address` is reached, "" if that cannot be found out.

    Gloo would take the one that this machine's own name leads to, which often is one that only it can reach.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    asked = struct.pack("256s", name.encode()[:15])
                    if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, asked)[20:24]) == own:
                        return name
    except OSError:
        pass
    return ""


def _connect(info: RankInfo, backend: str, timeout: float) -> None:
    """Returns when every rank is connected. Raises RuntimeError, naming the address, when some do not come."""
    os.environ.update(MASTER_ADDR=info.address, MASTER_PORT=str(info.port))
    others = f"the other {info.world - 1} of {info.world} processes at {info.address} port {info.port}"
    patience = threading.Timer(WAITING, log.warning, ("rank %d waits for %s", info.rank, others))
    patience.daemon = True
    patience.start()
    try:
        distributed.init_process_group(
            backend, rank=info.rank, world_size=info.world, timeout=timedelta(minutes=timeout + SPARE)
        )
        ranks.barrier()
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {info.rank} could not connect to all {info.world} ranks at {info.address} port {info.port}: {error}"
        ) from error
    finally:
        patience.cancel()
