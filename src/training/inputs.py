"""What a run reads: training examples with their order, held-out examples, and the reference scores of pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.config import Config
from src.data import kind_of, open_h5, open_pairs, open_slices, open_text
from src.data.batch import PairExample, TextExample
from src.data.h5 import H5Texts
from src.data.joined import Growing, Joined
from src.data.pairs import Pairs
from src.data.progress import counted
from src.data.report import DataReport
from src.data.sampler import MagicPrime, Order, RandomSlices, Sequential, Shuffled, Steps, check_magic_prime
from src.data.split import Subset, split
from src.data.text import Texts, text_type
from src.data.tokenizer import Tokenizer, load_tokenizer
from src.files import file_hash
from src.layers.placing import Layout
from src.losses import LOSSES
from src.model.checkpoint import load_model
from src.model.rwkv import RWKV
from src.training.evaluate import evaluate_text, evaluating, pair_metrics, score_pairs
from src.training.reference import reference_scores
from src.training.start import Start, device_of

log = logging.getLogger(__name__)


class Inputs:
    """Opens the files that `config` names, for the model of `start`. Every reader raises ValueError with file:line."""

    def __init__(self, config: Config, start: Start, folder: Path) -> None:
        self.config = config
        self.start = start
        self.folder = folder
        self.reports: list[DataReport] = []
        self.split_off: Subset | None = None  # what --val_split took from the training examples

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The World vocabulary, or --vocab_file."""
        return load_tokenizer(self.start.sizes.vocab_size, self.config.vocab_file or None)

    def _pairs(self, path: str, *, cap: bool) -> Pairs:
        c = self.config
        pairs = open_pairs(
            path,
            self.tokenizer,
            template=c.template,
            max_len=c.rlhf_max_corpus_len if cap else 0,
            ctx_len=c.ctx_len if cap else 0,
            skip_bad=c.skip_bad,
        )
        self.reports.append(pairs.report)
        return pairs

    def _texts(self, path: str, *, cut: bool, data_type: str = "", teacher: bool = False) -> Texts | H5Texts:
        c = self.config
        how: dict[str, Any] = {"train_on_prompt": c.train_on_prompt, "skip_bad": c.skip_bad}
        how["ctx_len"] = c.ctx_len if cut else 0
        texts: Texts | H5Texts
        if text_type(path, data_type) == "h5":  # already tokenised
            how |= {"teacher": teacher, "top_k": c.top_k if "top_k" in c.given else 0}
            texts = open_h5(path, self.start.sizes.vocab_size, shown=c.enable_progress_bar, **how)
        else:
            texts = open_text(path, self.tokenizer, data_type=data_type, template=c.template, **how)
        self.reports.append(texts.report)
        return texts

    def training(self, score: bool = True) -> Steps:
        """The training examples as optimizer steps; pairs with their reference scores if `score`."""
        c = self.config
        if LOSSES[c.loss].kind == "pairs":
            examples: Any = self._pairs(c.pair_file, cap=True)
            if score and LOSSES[c.loss].needs_reference:
                examples = examples.with_reference(self.reference(examples, c.trust_reference).tolist())
            order = self._shuffled(len(examples))
        elif text_type(c.data_file, c.data_type) == "binidx":
            examples, order = self._corpus()
        else:
            from_file = LOSSES[c.loss].needs_teacher and not c.teacher_model
            examples = self._texts(c.data_file, cut=True, data_type=c.data_type, teacher=from_file)
            order = self._shuffled(len(examples))
        for line in self.reports[-1].lines():
            log.info(line)
        if c.val_split > 0:
            if not isinstance(examples, Pairs | Texts | H5Texts):
                raise ValueError("--val_split works on documents and pairs, not on slices of a corpus: give --val_file")
            examples, self.split_off = split(examples, c.val_split, c.seed)
            order = self._shuffled(len(examples))
            log.info("--val_split: %d examples train, %d are held out", len(examples), len(self.split_off))
        if c.infctx_dataset_multiplier > 1 or not c.reset_state:
            examples = self._joined(examples)
            order = self._shuffled(len(examples))
        return Steps(examples, order, c.micro_bsz, c.accumulate_grad_batches, growing=self._growing())

    def _shuffled(self, n: int) -> Order:
        return Shuffled(n, self.config.seed) if self.config.random_mode else Sequential(n)

    def _joined(self, examples: Any) -> Joined:
        """--infctx_dataset_multiplier documents to a sample."""
        c = self.config
        if not hasattr(examples, "length"):
            raise ValueError(
                "--infctx_dataset_multiplier and --reset_state 0 work on documents, not on slices of a corpus, which "
                "cross the borders of documents anyway"
            )
        seed = c.seed if c.random_mode else None
        joined = Joined(examples, c.infctx_dataset_multiplier, c.ctx_len, seed, c.reset_state)
        log.info("%d documents joined to %d samples of at most %d tokens", len(examples), len(joined), c.ctx_len)
        return joined

    def _growing(self) -> Growing | None:
        """--initial_ctx_len: how long samples are at each step."""
        c = self.config
        if not c.initial_ctx_len:
            return None
        log.info(
            "samples grow from %d to %d tokens in %d steps; what is longer is cut off until then",
            *(c.initial_ctx_len, c.ctx_len, c.ctx_warmup_steps),
        )
        return Growing(c.initial_ctx_len, c.ctx_len, c.ctx_warmup_steps)

    def _corpus(self) -> tuple[Any, Order]:
        """binidx: every slice once per pass by the magic prime (stage 3 or --magic_prime), else random slices."""
        c = self.config
        stateless = c.train_stage == 3 or c.magic_prime > 0
        slices, report = open_slices(c.data_file, self.start.sizes.vocab_size, c.ctx_len, c.ctx_len if stateless else 1)
        self.reports.append(report)
        if not c.random_mode:
            return slices, Sequential(len(slices))
        if not stateless:
            return slices, RandomSlices(len(slices), c.seed)
        prime = check_magic_prime(c.magic_prime, report.trained + 1, c.ctx_len)
        log.info("magic prime %d: %d slices of %d tokens, each once per pass", prime, prime, c.ctx_len)
        return slices, MagicPrime(prime)

    def reference(self, pairs: Pairs, trust: bool = False) -> Tensor:
        """(n, 2) summed log-probabilities under the reference model, or the file's own where they may be trusted.

        `trust` takes the file's own unseen and raises ValueError when it lacks any.
        """
        c = self.config
        known = all(pair.reference is not None for pair in pairs)
        if trust and not known:
            raise ValueError(f"--trust_reference 1: {pairs.report.source} lacks reference scores of some pairs")
        if known and (trust or (not c.reference_model and self._same_reference(pairs.sidecar or {}))):
            log.info("reference scores of %d pairs: from %s", len(pairs), pairs.report.source)
            return torch.tensor([pair.reference for pair in pairs], dtype=torch.float32)
        model, model_hash, layout = self.start.model, self.start.hash, self.start.report.layout
        if c.reference_model:
            model, layout = self._foreign_model(c.reference_model)
            model_hash = file_hash(c.reference_model)
        held = [layout.store, *sorted(layout.packed), "masters", *sorted(layout.trained), str(model.emb.weight.device)]
        with counted(len(pairs), "reference", c.enable_progress_bar) as done:
            return reference_scores(
                model,
                pairs,
                model_hash=model_hash,
                arithmetic=" ".join(held),
                folder=self.folder,
                chunk=c.head_chunk,
                progress=done,
                length=c.chunk,
            )

    def _same_reference(self, about: dict) -> bool:
        """Whether a sidecar speaks of this base model, in this arithmetic, of answers cut as here."""
        return (
            about.get("reference") == "sum"
            and about.get("model") == self.start.hash
            and about.get("precision") == self.config.precision
            and about.get("storage", "none") == self.config.storage
        )

    def _foreign_model(self, path: str) -> tuple[RWKV, Layout]:
        """--reference_model, for as long as it is needed."""
        model, report = load_model(path, compute_dtype=self.start.model.compute_dtype, device=device_of(self.config))
        if model.sizes.vocab_size != self.start.sizes.vocab_size:
            raise ValueError(
                f"--reference_model {path} has a vocabulary of {model.sizes.vocab_size}, "
                f"the model one of {self.start.sizes.vocab_size}"
            )
        return model, report.layout

    def held_out(self, *, reference: bool) -> Callable[[], dict[str, Any]] | None:
        """The held-out examples as a function that scores them under the model of the moment; None without any.

        They are --val_file, or what --val_split took. Pairs are compared with their reference scores, taken now, if
        `reference`; otherwise the preference is raw.
        """
        c = self.config
        if self.split_off is not None:
            if isinstance(self.split_off[0], TextExample):
                return self._held_out_texts(self.split_off)
            examples = [self.split_off[index] for index in range(len(self.split_off))]
            known = [pair.reference for pair in examples]
            return self._held_out_pairs(examples, torch.tensor(known) if None not in known else None)
        if not c.val_file:
            return None
        if kind_of(c.val_file) == "text":
            return self._held_out_texts(self._texts(c.val_file, cut=False))
        pairs = self._pairs(c.val_file, cap=False)
        return self._held_out_pairs(pairs, self.reference(pairs) if reference else None)

    def _held_out_texts(self, texts: Iterable[TextExample]) -> Callable[[], dict[str, Any]]:
        def score() -> dict[str, Any]:
            with evaluating(self.start.model):
                return evaluate_text(self.start.model, texts, self.config.head_chunk)

        return score

    def _held_out_pairs(self, pairs: Sequence[PairExample], base: Tensor | None) -> Callable[[], dict[str, Any]]:
        def score() -> dict[str, Any]:
            with evaluating(self.start.model):
                sums, counts = score_pairs(self.start.model, pairs, self.config.head_chunk, length=self.config.chunk)
            return pair_metrics(sums, counts, base)

        return score
