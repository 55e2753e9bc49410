"""docs/choosing.md out of the plan of memory: `python -m tests.support.choosing_page` writes it again."""

from pathlib import Path

from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training import verdict
from rwkv_rlhf.training.dry_run import shape_model
from rwkv_rlhf.training.memory import memory_by_part

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing.md"
CARDS = (8, 16, 24, 80)  # GB
SHARE = 0.92  # of a card that a program may fill
NAMES = ("0.1B", "0.4B", "1.5B", "2.9B", "7.2B", "13.3B")
SHAPES = {name: f"L{layers}-D{width}" for name, (layers, width) in zip(NAMES, verdict.SHAPES, strict=True)}
WAYS = {
    "full": "--peft full",
    "LoRA 16": "--peft lora --lora_r 16",
    "LoRA 16, nf4": "--peft lora --lora_r 16 --quant 1",
    "LoRA 16, int8": "--peft lora --lora_r 16 --quant 1 --quant_mode int8",
    "state": "--peft state",
}
ALWAYS = "--dry_run 1 --precision bf16 --micro_bsz 1 --ctx_len 2048 --dry_run_shape"
HEAD = """\
# What to choose

## What fits

Memory of a training step in GiB, as the program plans it: RWKV-7, bf16, `--micro_bsz 1 --ctx_len 2048 --grad_cp 1`,
AdamW; and the smallest card (of 8, 16, 24 and 80 GB) that holds it, with 8 % left for what else lies there.

"""
TAIL = """
`python train.py --dry_run 1 --dry_run_shape L32-D4096 ...` says it of your own command. More tokens a step
cost activations only (`--infctx 1` bounds them: `docs/infinite-context.md`), longer texts otherwise nothing;
DPO runs two answers a pair, and no second model. Full training takes less with `--optim adam8bit`, `lion` or a
strategy that ends in `_offload` (`docs/running.md`).

## Which method

| you have | take | page |
|---|---|---|
| a better and a worse answer to each prompt | DPO; ORPO or SimPO without a reference | `docs/dpo.md`, `docs/orpo.md` |
| answers, each marked good or bad | KTO | `docs/kto.md` |
| good answers only | SFT; DPO with sampled rejects where manner matters most | `docs/sft.md`, `docs/dpo.md` |
| a way to check an answer by program | GRPO | `docs/reinforcement.md` |
| preferences and many prompts without answers | a reward model, then PPO | `docs/reinforcement.md` |
| a larger model of the same vocabulary | distillation | `docs/distillation.md` |
| a style, or a role, and very little memory | state tuning | `docs/state-tuning.md` |

## Which adapter, rank and rate

| | take |
|---|---|
| adapter | LoRA, rank 16; DoRA or PiSSA where LoRA is not enough; Bone or MiSS, rank 64, for the cheapest step |
| rank | 8 to 16 for manners, 32 to 64 for a new skill or language; full training for new knowledge |
| storage | bf16 if it fits; int8, then nf4, if not. Nothing is packed unless you ask |
| rate of LoRA | 1e-4 to 1e-3 below 0.5B, 5e-5 at 1.5B, 1e-5 to 2e-5 from 7B; preferences want half of what SFT does |
| rate of full training | a third to a tenth of LoRA's |
| passes | 1 to 3; held-out scores say when to stop (`--val_split 0.1 --early_stop 2`) |
"""


def memory(shape: str, way: str) -> float:
    """GiB of a step on a GPU."""
    config = parse([*ALWAYS.split(), shape, *way.split()])
    model, _ = shape_model(config)
    return sum(memory_by_part(config, model, config.ctx_len, gpu=True).device.values()) / 2**30


def cell(size: float) -> str:
    """The size and the card that holds it."""
    card = next((str(card) for card in CARDS if size * 2**30 <= SHARE * card * 1e9), "more than 80")
    return f"{size:.1f} ({card})"


def row(name: str) -> str:
    """One model's line."""
    cells = (cell(memory(SHAPES[name], way)) for way in WAYS.values())
    return f"| {name}, {SHAPES[name]} | {' | '.join(cells)} |\n"


def text() -> str:
    """What the page must say."""
    head = f"| model | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}\n"
    return HEAD + head + "".join(map(row, SHAPES)) + TAIL


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
