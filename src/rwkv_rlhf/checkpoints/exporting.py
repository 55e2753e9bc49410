"""A whole model on its way to another program: what there is to write, what the other program can hold, and its judge.

Legend: C width, H heads, N head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import NO_FLAGS, AdapterFlags, check_base, cold_of, open_adapter
from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.checkpoints.merging import PROBE, Merged, base_reader, combined_model, shapes
from rwkv_rlhf.checkpoints.tensor_files import first_line
from rwkv_rlhf.files import atomic_folder, atomic_path
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import Sizes, sizes_of
from rwkv_rlhf.settings.exports import EXPORTS, TargetFacts
from rwkv_rlhf.settings.implementations import load

Tensors = Mapping[str, Tensor]
Make = Callable[[Tensors], Tensor]

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# largest difference of log-probabilities that rounding explains, relative to the logits' range, by --dtype
TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 5e-2}
TOP = 20  # likeliest tokens that are compared


class Vocabulary(NamedTuple):
    """How text becomes ids and a conversation becomes text: what other programs must know beside the tensors.

    words: bytes by id; none where `tokenizer` is the content of a tokenizer.json. end: ids of the mark that closes an
    answer, () if there is none. chat_template: Jinja, or "".
    """

    words: Mapping[int, bytes]
    end: tuple[int, ...]
    chat_template: str
    tokenizer: str = ""


class About(NamedTuple):
    """What a file says of itself: its name, the file that it was trained from, licence and address; "" = unknown."""

    name: str
    base: str = ""
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class ExportedModel:
    """A model that is to be written: its tensors are opened again by `read` for each block, so that none stays.

    shapes: on the meta device. run: builds it in float32 as it was trained (base and adapter apart), for the judge.
    """

    shapes: Tensors
    read: Callable[[], Tensors]
    run: Callable[[], RWKV]
    vocabulary: Vocabulary
    about: About

    @property
    def sizes(self) -> Sizes:
        """Sizes of the model."""
        return sizes_of(self.shapes)


class ExportOptions(NamedTuple):
    """dtype: of the matrices, "" = as they are. shard_size: bytes of one file of several. check: ask the judge."""

    dtype: str
    shard_size: int
    check: bool


class Part(NamedTuple):
    """One tensor of what is written: its name there, and how it is made of the model's (also on the meta device)."""

    name: str
    make: Make
    dtype: torch.dtype | None = None  # None = as it is

    def made(self, tensors: Tensors) -> Tensor:
        """The tensor in its dtype. Raises ValueError as `cast`."""
        tensor = self.make(tensors)
        return tensor if self.dtype is None else cast(tensor, self.dtype, self.name)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` as `dtype`. Raises ValueError, with `name`, where float16 has no room for a number."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and not found.is_meta and not found.isfinite().all():
        raise ValueError(
            f"{name} has numbers beyond 65504, which f16 cannot hold: give --dtype bf16 or f32 where it can"
        )
    return found


def taken(name: str) -> Make:
    """The tensor `name` as it is."""
    return lambda tensors: tensors[name]


def flat(name: str) -> Make:
    """The tensor `name` in one dimension."""
    return lambda tensors: tensors[name].flatten()


def transposed(name: str) -> Make:
    """The tensor `name`, its last two dimensions interchanged."""
    return lambda tensors: tensors[name].transpose(-1, -2)


def stacked(names: Sequence[str]) -> Make:
    """Vectors under each other: (n, 1, 1, C)."""
    return lambda tensors: torch.stack([tensors[name].flatten() for name in names])[:, None, None]


def made_one_by_one(parts: Sequence[Part], model: ExportedModel) -> Iterator[Tensor]:
    """The tensors of `parts`, each computed when it is asked for; the model is opened anew for each block."""
    block, tensors = "", model.read()
    for part in parts:
        if (now := re.sub(r"(\d+\.).*", r"\1", part.name)) != block:
            block, tensors = now, {}  # let the old pages go before the file is opened again
            tensors = model.read()
        yield part.made(tensors)


def open_exported(
    base: str | Path,
    adapter: str | Path | None,
    vocabulary: Vocabulary,
    about: About,
    *,
    flags: AdapterFlags = NO_FLAGS,
    initial_file: str = "",
    cold: str = "",
    force: bool = False,
) -> ExportedModel:
    """The model of a base and perhaps an adapter. Raises ValueError as `open_adapter`, `check_base` and `cold_of`."""
    options = BuildOptions(torch.float32, share=True)
    if adapter is None:
        read: Callable[[], Tensors] = base_reader(base, None)
        known = shapes(read())
        return ExportedModel(
            known, read, lambda: build_model(known, options, source=base, reopen=read)[0], vocabulary, about
        )
    file = open_adapter(adapter, flags, initial_file=initial_file, force=force)
    check_base(file.sidecar, base, force=force)
    below = base_reader(base, cold_of(adapter, file.sidecar, cold, force=force), force=force)
    trained = dataclasses.replace(options, layout=file.layout, initial=file.initial or None)

    def run() -> RWKV:
        names = {"source": adapter, "base_source": base}
        return combined_model(shapes(below()), file.tensors, trained, reopen=below, **names)[0]

    return ExportedModel(Merged(below(), file).shapes(), lambda: Merged(below(), file), run, vocabulary, about)


def check_target(name: str, sizes: Sizes, dtype: str) -> TargetFacts:
    """What the target `name` can hold. Raises ValueError, one sentence, where that is not this model."""
    target = EXPORTS[name].target
    assert target is not None, name
    if target.versions and sizes.version not in target.versions:
        raise ValueError(f"--to {name} holds {' and '.join(target.versions)} models, this is {sizes.version}")
    if target.head_sizes and sizes.head_size not in target.head_sizes:
        known = " or ".join(map(str, target.head_sizes))
        raise ValueError(f"--to {name} holds heads of {known} channels, this model has {sizes.head_size}")
    if target.head_sizes and sizes.dim_att != sizes.n_embd:
        raise ValueError(
            f"--to {name}: attention and model must be equally wide there, these are {sizes.dim_att} and {sizes.n_embd}"
        )
    states = () if target.states else sizes.states
    if states:
        raise ValueError(
            f"--to {name} has no place for learnt initial states ({', '.join(states)}), which this model has"
        )
    if sizes.n_layer < target.blocks:
        raise ValueError(f"--to {name} holds models of at least {target.blocks} blocks, this has {sizes.n_layer}")
    if dtype not in target.dtypes:
        known = ", ".join(filter(None, target.dtypes))
        raise ValueError(f"--dtype {dtype} with --to {name}: must be one of {known}")
    if target.needs and importlib.util.find_spec(target.needs) is None:
        raise ValueError(f"--to {name} needs the package {target.needs}: pip install {target.needs}")
    return target


def export_model(name: str, model: ExportedModel, path: Path, options: ExportOptions) -> str:
    """Write `model` for the target `name`; returns a sentence about the check, "" when there was none.

    `path` is there only when everything went well, the judge's answer included. Raises ValueError as `check_target`,
    `check_by_judge`, and when `path` cannot be written.
    """
    target = check_target(name, model.sizes, options.dtype)
    write: Callable[[ExportedModel, Path, ExportOptions], None] = load(EXPORTS[name].implementation)
    if len(target.suffixes) > 1:
        write(model, path, options)
        return ""
    with (atomic_path if target.suffixes else atomic_folder)(path) as temporary:
        write(model, temporary, options)
        return check_by_judge(model, temporary, target, options.dtype) if options.check else ""


def missing_judge(target: TargetFacts) -> list[str]:
    """The packages that the judge of a target needs and that are not installed."""
    return [package for package, module in target.judge_needs.items() if importlib.util.find_spec(module) is None]


def probe_tokens(vocab_size: int) -> list[int]:
    """The tokens that a judge reads: World's single bytes of a fixed text."""
    return [(byte + 1) % vocab_size for byte in PROBE.encode()]


@torch.no_grad()
def own_logprobs(model: ExportedModel) -> Tensor:
    """Log-probabilities (V,) float32 after the probe, as the model was trained; the model is gone afterwards."""
    own = model.run().requires_grad_(False).eval()
    hidden, _ = own(torch.tensor([probe_tokens(own.sizes.vocab_size)]))
    logits: Tensor = own.head(hidden[:, -1])[0].float()
    return logits.log_softmax(0)


def judged(path: Path, target: TargetFacts, own: Tensor, *, lora: str | Path = "") -> float:
    """The largest difference between `own` log-probabilities and those of the judge, relative to the range of `own`.

    The judge runs in a process of its own, and lays the adapter `lora` over the model. Raises ValueError when it cannot
    run the file at all.
    """
    program = Path(__file__).parent / "judges" / target.judge
    asked = {"path": str(path), "tokens": probe_tokens(len(own)), "top": TOP, "lora": str(lora)}
    done = subprocess.run(
        [sys.executable, "-P", str(program)], input=json.dumps(asked), capture_output=True, text=True, errors="replace"
    )
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if done.returncode or not answer.get("ids"):
        said = first_line(
            RuntimeError(answer.get("error") or done.stderr.strip().rpartition("\n")[2] or "no reason given")
        )
        raise ValueError(f"{', '.join(target.judge_needs)} cannot run what was written, and nothing was kept: {said}")
    found = torch.tensor(answer["logprobs"])
    difference = (own[answer["ids"]] - found).abs().max()
    return float(difference / (own.max() - own.min()).clamp(min=1e-12))


def check_by_judge(model: ExportedModel, path: Path, target: TargetFacts, dtype: str) -> str:
    """Compare the file or folder with the model; returns a sentence.

    Raises ValueError when the judge gives other numbers than rounding to `dtype` explains.
    """
    own = own_logprobs(model)
    difference = judged(path, target, own)
    widest = {torch.float32: "f32", torch.float16: "f16"}
    allowed = TOLERANCE.get(dtype) or max(TOLERANCE[widest.get(t.dtype, "bf16")] for t in model.shapes.values())
    names = ", ".join(target.judge_needs)
    if not difference <= allowed:
        raise ValueError(
            f"{names} gives other log-probabilities than this program: they differ by {difference:.1e} of their range, "
            f"rounding explains {allowed:.0e}; nothing was kept"
        )
    return f"check: log-probabilities of {names} differ by at most {difference:.1e} of their range"
