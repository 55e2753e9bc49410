"""A base model, merging into it, and what models answer."""

import dataclasses
from pathlib import Path

import torch

from rwkv_rlhf.checkpoints.adapter_files import write_factors
from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model, load_model, trainable
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.run_folder import trained_tensors
from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.commands import merge
from rwkv_rlhf.plan import make_plan
from tests.support.models import any_initial_tensors

VOCABULARY, WIDTH, HEAD = 300, 128, 64


TOKENS = [5, 0, 17, 299, 3, 3, 42, 7, 0, 101, 250, 9]


def base_tensors(dtype: torch.dtype, version: str = "x070") -> dict[str, torch.Tensor]:
    tensors = any_initial_tensors(version, 2, WIDTH, VOCABULARY, HEAD, 0)
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():
        scale = 1.0 if name == "emb.weight" else 0.5 / WIDTH**0.5 if value.dim() == 2 else 0.05
        tensors[name] = (value + scale * torch.randn(value.shape, generator=generator)).to(dtype)
    return tensors


def run_merge(base: Path, checkpoint: Path, output: Path, *words: str) -> dict[str, torch.Tensor]:
    arguments = ["--base_model", base, "--lora_checkpoint", checkpoint, "--output", output, "--device", "cpu", *words]
    assert merge.main([str(word) for word in arguments]) == 0
    return read_tensors(output)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model(torch.tensor([TOKENS]))[0])[0].float()


def spread(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / (one.max() - one.min()))


def plain_logits(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits(build_model(tensors, BuildOptions(torch.float32))[0])


def greedy(base: Path, checkpoint: Path) -> list[int]:
    """12 tokens after TOKENS of base and adapter together, all read again for each."""
    model, _ = load_combined(base, checkpoint, BuildOptions(torch.float32))
    text = list(TOKENS)
    with torch.no_grad():
        for _ in range(12):
            text.append(int(model.head(model(torch.tensor([text]))[0][:, -1]).argmax()))
    return text[len(TOKENS) :]


RATES = {"lr_init": 1e-4, "lr_final": 1e-5}


def plan_of(mode, **more):
    plan = make_plan(mode, 2, rank=8, alpha=16.0, dropout=0.0, **RATES, **more)
    return dataclasses.replace(plan, states=("att.time_state",) if mode == "state" else ())


def trained(folder, mode, *, version="x070", dtype=torch.float32, quant="none", plan=None, limited=False):
    """(base file, checkpoint, the model) "trained" by adding noise to all that trains."""
    base, checkpoint = folder / "base.pth", folder / "rwkv-0.pth"
    if not base.exists():
        write_tensors(base_tensors(dtype, version), base)
    plan = plan or plan_of(mode)
    model, report = load_model(base, BuildOptions(torch.float32, plan=plan, quant=quant, limited=limited))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    write_tensors(trained_tensors(model, report.dtypes, "base"), checkpoint)
    sidecar = sidecar_of(version, report.layout, plan, base)
    name, sha256 = write_factors(model, folder, ".pth")
    write_sidecar(dataclasses.replace(sidecar, initial_file=name, initial_sha256=sha256), checkpoint)
    return base, checkpoint, model.eval()
