"""Numbers that nobody expects behind every flag that takes one, and variables of odd environments."""

import argparse
import importlib
import math
import os
import pkgutil
from pathlib import Path
from random import Random
from typing import Any

from rwkv_rlhf.commands import parsers
from rwkv_rlhf.distributed.launch import rank_info_of
from rwkv_rlhf.generation.sampling_params import options, sampling_params
from rwkv_rlhf.settings.command_line import Parser, kinds, parse
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.help import flag_of
from rwkv_rlhf.settings.surroundings import take_over
from rwkv_rlhf.training.dry_run import dry_run_shape

NUMBERS = (
    *("nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e309", "-1e309", "1e308", "1e-308", "5e-324", "-0.0", "-0"),
    *(
        "0",
        "1",
        "-1",
        "2",
        "3",
        "7",
        "1.0",
        "1.5",
        "1e3",
        "1E3",
        "0x10",
        "0b1",
        "1_000",
        " 5 ",
        "+5",
        "--5",
        "1,5",
        "1.",
    ),
    *("", " ", "None", "true", "\u0665", "\uff11", "\xb2", "1e", "9" * 25, "-" + "9" * 25, "9" * 400, "9" * 5000),
    *(str(2**31 - 1), str(2**31), str(2**63 - 1), str(2**63), str(2**64), "1" + "0" * 18, "1" + "0" * 300),
)
SHAPES = ("L2-D64", "L1-D64:V10", f"L{10**9}-D64", f"L2-D{10**9}", f"L2-D64:V{10**30}", "L2-D63", "L0-D0")
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_NNODES"),
    *("SLURM_STEP_NUM_NODES", "SLURM_NODELIST", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_JOB_NAME"),
)
VALUES = (
    "0",
    "1",
    "2",
    "-1",
    "",
    "abc",
    "1.5",
    "4294967296",
    "9" * 400,
    "node[1-3]",
    "node[",
    "127.0.0.1",
    "bash",
    "\udce9",
)


def numeric_settings() -> list[str]:
    return [name for name, kind in kinds().items() if kind in (int, float)]


def train_flags(folder: Path, rng: Random) -> None:
    """One to three numeric flags of train.py."""
    words = ["--load_model", "M", "--data_file", "d.jsonl"]
    if rng.random() < 0.5:
        words += rng.choice((["--ppo", "1"], ["--grpo", "1"], ["--dpo", "1"], ["--peft", "lora"], ["--infctx", "1"]))
        words += ["--rlhf_train_file", "p.csv", "--reward_model", "R"] if words[-2] in ("--ppo", "--grpo") else []
    for name in rng.sample(numeric_settings(), rng.choice((1, 1, 3))):
        words.append(f"{flag_of(name)}={rng.choice(NUMBERS)}")
    check_finite(parse(words))


def shape_flags(folder: Path, rng: Random) -> None:
    """What a dry run computes of numbers that are legal."""
    words = ["--dry_run", "1", "--dry_run_shape", rng.choice(SHAPES[:2] if rng.random() < 0.7 else SHAPES)]
    words += rng.choice(([], ["--peft", "lora"], ["--infctx", "1"], ["--dpo", "1", "--rlhf_train_file", "p.csv"]))
    for name in rng.sample(numeric_settings(), rng.choice((1, 1, 2))):
        words.append(f"{flag_of(name)}={rng.choice(NUMBERS)}")
    dry_run_shape(parse(words))


def check_finite(config: Config) -> None:
    for name in numeric_settings():
        value = getattr(config, name)
        assert value is None or not isinstance(value, float) or math.isfinite(value), f"{name} {value}"


def command_parsers() -> dict[str, Parser]:
    """The parser of every command that has one of its own."""
    names = [module.name for module in pkgutil.iter_modules(parsers.__path__)]
    return {name: importlib.import_module(f"{parsers.__name__}.{name}").parser() for name in names}


def command_flags(folder: Path, rng: Random) -> None:
    """A numeric flag of any command beside train.py, and what sampling makes of it."""
    name, parser = rng.choice(sorted(command_parsers().items()))
    actions: list[argparse.Action] = [one for one in parser._actions if one.option_strings and one.nargs is None]
    numeric = [one for one in actions if one.type is not None and type_of(one) in (int, float)]
    needed = ["x" for one in parser._actions if one.required and not one.option_strings]
    needed += [word for one in actions if one.required for word in (one.option_strings[0], "x")]
    if name == "merge":
        needed += ["--base_model", "b", "--lora_checkpoint", "c", "--output", "o.pth"]
    odd = [f"{one.option_strings[0]}={rng.choice(NUMBERS)}" for one in rng.sample(numeric, min(2, len(numeric)))]
    flags = parser.parse_args([*needed, *odd])
    for one in numeric:
        value = getattr(flags, one.dest)
        assert not isinstance(value, float) or math.isfinite(value), f"{name} {one.dest} {value}"
    if all(hasattr(flags, field.name) for field in options()):
        sampling_params(flags)


def type_of(action: argparse.Action) -> Any:
    """int or float, of a flag that takes a number."""
    for text, kind in (("1", int), ("1.5", float)):
        try:
            found = action.type(text) if callable(action.type) else None
        except Exception:  # it takes no such text
            continue
        if type(found) is kind:
            return kind
    return None


def environment(folder: Path, rng: Random) -> None:
    """Which rank this is, by whatever a launcher or a shell left in the variables."""
    some = VARIABLES if rng.random() < 0.5 else rng.sample(VARIABLES, rng.randint(0, len(VARIABLES)))
    odd = rng.random() / 4
    variables = {name: rng.choice(VALUES if rng.random() < odd else VALUES[:3]) for name in some}
    nodes = rng.choice((1, 2))
    config = Config(devices=nodes, num_nodes=nodes)
    info = rank_info_of(config, variables)
    assert 0 <= info.rank < info.world and 0 <= info.local_rank < info.local_world <= info.world, info
    assert 0 <= info.port < 65536, info


def surroundings(folder: Path, rng: Random) -> None:
    """A dry run of a shape on terminals and in shells of every kind."""
    odd = {
        "COLUMNS": ("", "0", "-1", "abc", "9" * 30),
        "LINES": ("0", "x"),
        "TERM": ("", "dumb", "unknown"),
        "NO_COLOR": ("1",),
        "FORCE_COLOR": ("1", "0"),
        "LC_ALL": ("C", "tr_TR", "no.such"),
        "PYTHONUTF8": ("0",),
        "OMP_NUM_THREADS": ("0", "abc", "-3", "9" * 30),
        "CUDA_VISIBLE_DEVICES": ("", "-1", "abc"),
        "MPLBACKEND": ("module://nowhere", ""),
        "HOME": ("", "/nowhere"),
        "TMPDIR": ("/nowhere",),
        "JUPYTER_COLUMNS": ("x",),
        "TTY_COMPATIBLE": ("1",),
    }
    before = dict(os.environ)
    try:
        for name in rng.sample(sorted(odd), rng.randint(1, 5)):
            os.environ[name] = rng.choice(odd[name])
        take_over()
        dry_run_shape(parse(["--dry_run", "1", "--dry_run_shape", "L2-D64"]))
    finally:
        os.environ.clear()
        os.environ.update(before)


TYPED = {
    "flags of train.py": train_flags,
    "flags of a dry run": shape_flags,
    "flags of commands": command_flags,
    "variables of launchers": environment,
    "variables of shells": surroundings,
}
