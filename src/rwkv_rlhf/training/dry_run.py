"""`--dry_run 1`: what would be trained, on what, for how long and in how much memory; nothing is trained.

Legend: T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rwkv_rlhf.data.batch import IGNORE, AnswerBatch, PairBatch, RatedBatch, TextBatch
from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.training.choices import with_pass
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.length import optimizer_steps
from rwkv_rlhf.training.memory import Estimate, loading_peak, memory_by_part
from rwkv_rlhf.training.optimizers import state_of
from rwkv_rlhf.training.overview import room_for, step_tokens
from rwkv_rlhf.training.recipe import say_recipe
from rwkv_rlhf.training.start import Start, shape_model

SAMPLES = 3
SHOWN = 200  # tokens of a sample
MIB = 1 << 20


def room_of(name: str) -> str:
    """emb, head, att, ffn or norms: where a tensor belongs."""
    words = name.split(".")
    return next((room for room in ("emb", "att", "ffn") if room in words), "head" if "head" in words[0] else "norms")


def rooms(start: Start) -> Iterator[tuple[str, int, int]]:
    """(room, trainable, frozen) parameters: emb, attention, feed-forward, norms, head; packed matrices are frozen."""
    train: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in start.model.named_parameters():
        part = room_of(name)
        (train if parameter.requires_grad else frozen)[part] += parameter.numel()
    for name, layer in matrices(start.model):
        if name in start.report.layout.packed:  # no parameter, but as many numbers
            frozen[room_of(name)] += layer.shape.numel()
    for room in dict.fromkeys([*train, *frozen]):
        yield room, train[room], frozen[room]


Decode = Callable[[list[int]], str]  # of a tokenizer
GOOD, BAD = "bold green", "bold red"  # what becomes likelier, and what less likely


def coloured(tokens: list[int], trained: list[bool], decode: Decode, style: str = GOOD) -> Text:
    """The text of `tokens`, what is trained on in `style`, the rest dim."""
    text = Text()
    run: list[int] = []
    for at, token in enumerate(tokens[:SHOWN]):
        run.append(token)
        if at + 1 == min(len(tokens), SHOWN) or trained[at + 1] != trained[at]:
            text.append(decode(run), style=style if trained[at] else "dim")
            run = []
    return text


def pair_sample(batch: AnswerBatch, decode: Decode) -> Iterator[Text]:
    """The first prompt of a batch with each of its answers."""
    prompt = [*batch.prompts[: int(batch.prompt_starts[1])].tolist(), int(batch.answers[0])]
    good = [bool(batch.good[0])] if isinstance(batch, RatedBatch) else [True, False]
    for answer, likes in enumerate(good):
        first, end = int(batch.starts[answer]), int(batch.starts[answer + 1])
        tokens = batch.answers[first + 1 : end].tolist()
        if (last := int(batch.targets[end - 1])) != IGNORE:  # of an answer that is judged it is among the inputs
            tokens.append(last)
        shown = prompt[-SHOWN // 2 :]
        trained = [False] * len(shown) + [True] * len(tokens)
        yield coloured(shown + tokens, trained, decode, GOOD if likes else BAD)


def text_sample(batch: TextBatch, decode: Decode) -> Text:
    """The first document of a batch."""
    end = int(batch.starts[1])
    targets = batch.targets[:end]
    trained = [False, *(targets != IGNORE).tolist()]
    return coloured([*batch.tokens[:end].tolist(), int(targets[-1].clamp(min=0))], trained, decode)


def samples(inputs: Inputs, steps: Steps | MixedSteps | PromptSteps) -> Iterator[Text]:
    """Three samples as they are trained: a pair's two answers, a rated answer, or the text; and general text; prompts
    without answers."""
    decode = inputs.tokenizer.decode
    if isinstance(steps, PromptSteps):
        yield from (Text(steps.examples[steps.order(position)].cue, style="dim") for position in range(SAMPLES))
        return
    for k in range(SAMPLES):
        batch = steps.micro_batch(k)
        if isinstance(batch, TextBatch):
            yield text_sample(batch, decode)
            continue
        yield from pair_sample(batch, decode)
        if isinstance(batch, PairBatch) and batch.general is not None:
            yield text_sample(batch.general, decode)


def show_memory(console: Console, estimate: Estimate, tokens: int) -> None:
    """The parts of a step's memory and their sums."""
    console.rule(f"memory of a step over {tokens:,} tokens (estimate)")
    for place, parts in (("in all", estimate.device), ("in all, on the host", estimate.host)):
        for part, size in {**parts, place: sum(parts.values())}.items() if parts else ():
            console.print(f"{part:28} {size / MIB:12,.1f} MiB", highlight=False)


def dry_run_shape(config: Config) -> None:
    """--dry_run_shape: what a model of that shape would take, in rows of --ctx_len tokens. No file is read.

    A GPU is assumed unless --accelerator is cpu. Raises ValueError for a shape that cannot be.
    """
    console = Console(stderr=False)
    model, report = shape_model(config)
    about = [*shape_lines(model), *report.lines(), state_of(config.optim, model).line()]
    console.print("\n".join(about), markup=False, highlight=False)
    tokens = config.micro_bsz * config.ctx_len
    show_memory(console, memory_by_part(config, model, tokens, gpu=config.accelerator != "cpu"), tokens)


def shape_lines(model: RWKV) -> list[str]:
    """The sizes in a sentence."""
    s = model.sizes
    layers = counted(s.n_layer, "layer")
    return [f"{s.version}, {layers} of width {s.n_embd}, feed-forward {s.dim_ffn}, vocabulary {s.vocab_size}"]


def dry_run(config: Config, folder: Path, start: Start) -> None:
    """Print the plan of the run and stop. Reference scores are not computed."""
    console = Console(stderr=False)
    inputs = Inputs(config, start, folder)
    steps = inputs.training(score=False)
    config = inputs.config = with_pass(config, steps)
    inputs.held_out(reference=False)  # opened, not scored
    for report in inputs.reports:
        console.print("\n".join([*report.lines(), *report.notices]), markup=False, highlight=False)
    for text in samples(inputs, steps):
        console.rule("what is trained on (green: likelier, red: less likely)")
        console.print(text)
    console.rule("parameters")
    for room, train, frozen in rooms(start):
        console.print(f"{room:8} {train:>15,} train {frozen:>15,} frozen", highlight=False)
    about = [*start.report.lines(), state_of(config.optim, start.model).line()]
    console.print("\n".join(about), markup=False, highlight=False)
    total = optimizer_steps(config, steps)
    seen = step_tokens(config, inputs, steps)
    gpu = device_for(config.accelerator) == "cuda"
    show_memory(console, memory_by_part(config, start.model, seen.largest, gpu=gpu), seen.largest)
    console.print(str(room_for(config, start, seen.largest)), highlight=False)
    console.print(f"{'while loading, host':28} {loading_peak(start) / MIB:12,.1f} MiB", highlight=False)
    console.rule("run")
    say_recipe(config, start.plan, start.sizes, start.report.trained, steps)
    count = total * config.accumulate_grad_batches * config.devices * config.num_nodes
    saves = -(-config.epoch_count // config.epoch_save) + 1
    disk = sum(p.numel() * 4 for p in start.model.parameters() if p.requires_grad) * (config.keep or saves)
    console.print(
        f"{counted(total, 'optimizer step')} in {counted(config.epoch_count, 'mini-epoch')}, "
        f"{counted(count * config.micro_bsz, 'sample')}, about "
        f"{round(count * seen.mean):,} tokens, up to {disk / MIB:,.0f} MiB of checkpoints",
        highlight=False,
    )
