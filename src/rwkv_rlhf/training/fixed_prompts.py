"""A few prompts that are answered before training and at each validation, so that one sees what the curves mean.

The answers take the likeliest tokens, draw nothing at random and leave every generator as it was: a run with them is,
bit for bit, a run without them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl

from rwkv_rlhf.data.batch import PairExample, TextExample
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.data.prompts import open_prompts
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.generation.answers import after_cue
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.samples import keep_answer
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.run_state import left_alone

log = logging.getLogger(__name__)

COUNT = 3  # prompts of the data
LOOKED_AT = 200  # examples among which they are looked for
MOST_TOKENS = 100  # of an answer
LONGEST_PROMPT = 1024  # tokens, of the data
BEGINNING = 16  # tokens of a document without a prompt


class FixedPrompt(NamedTuple):
    """Token ids, the text that a page shows for them, and the text that ends an answer ("" = none)."""

    ids: list[int]
    text: str
    stop: str


def prompts_of_file(config: Config, tokenizer: Tokenizer) -> list[FixedPrompt]:
    """Those of --sample_prompts. Raises ValueError with file and line."""
    found = open_prompts(
        config.sample_prompts,
        tokenizer,
        template=config.template,
        max_len=config.rlhf_max_corpus_len,
        skip_bad=config.skip_bad,
        drop_thinking=config.thinking == "drop",
    )
    return [FixedPrompt(one.prompt, one.cue, one.stop) for one in found]


def prompts_of_data(examples: Any, config: Config, tokenizer: Tokenizer) -> list[FixedPrompt]:
    """The first different prompts among some examples; of documents without one, their beginnings."""
    stop = find_templates(config.template)[0].template.end
    found: dict[tuple[int, ...], FixedPrompt] = {}
    for row in range(min(LOOKED_AT, len(examples))):
        ids = prompt_of(examples[row])[-LONGEST_PROMPT:]
        if ids and tuple(ids) not in found:
            found[tuple(ids)] = FixedPrompt(ids, tokenizer.decode(ids), stop)
        if len(found) == COUNT:
            break
    return list(found.values())


def prompt_of(example: object) -> list[int]:
    """The tokens before what is trained; [] where there are none."""
    if isinstance(example, PairExample | PromptExample):
        return list(example.prompt)
    if not isinstance(example, TextExample):
        return []
    tokens = example.tokens.tolist()
    first = len(tokens) // 2 if example.mask is None else int(np.argmax(example.mask))
    if example.mask is None or first == 0:
        first = min(BEGINNING, len(tokens) // 2)
    return [int(token) for token in tokens[:first]]


class FixedPrompts(pl.Callback):
    """Answers the prompts when the first mini-epoch begins and after each. Every rank takes part; rank zero writes."""

    def __init__(self, prompts: Sequence[FixedPrompt], sampler: Sampler, folder: Path, run: str) -> None:
        self.prompts, self.sampler, self.folder, self.run = prompts, sampler, folder, run
        self.harmless = Harmless("the fixed prompts are not answered")
        self.begun = False

    def state_dict(self) -> dict[str, Any]:
        """Whether the model before training was asked."""
        return {"begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ask it once."""
        self.begun = state_dict.get("begun", False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before step 1."""
        if not self.begun and trainer.global_step == 0:
            self.begun = True
            self.answer(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When what is held out was scored."""
        self.answer(trainer)

    def answer(self, trainer: pl.Trainer) -> None:
        """Ask all prompts and keep the answers."""
        with self.harmless(), left_alone(trainer.strategy.root_device):
            texts = self.answers()
            if ranks.is_rank_zero():
                for prompt, text in zip(self.prompts, texts):
                    keep_answer(self.folder, self.run, trainer.global_step, prompt.text, text)

    def answers(self) -> list[str]:
        """The likeliest answer to each prompt."""
        texts = []
        for stop in dict.fromkeys(prompt.stop for prompt in self.prompts):
            params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS, stop_texts=(stop,) if stop else ())
            mine = [prompt for prompt in self.prompts if prompt.stop == stop]
            done = self.sampler.generate([prompt.ids for prompt in mine], params)
            texts += [(prompt, after_cue(prompt.text, one.text)) for prompt, one in zip(mine, done)]
        return [next(text for known, text in texts if known is prompt) for prompt in self.prompts]
