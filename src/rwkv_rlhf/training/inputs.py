"""What a run reads: training examples with their order, held-out examples, and the reference scores of pairs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import initial_factors, needs_initial_factors
from rwkv_rlhf.checkpoints.loading import BuildOptions, file_sizes, load_model
from rwkv_rlhf.checkpoints.tensor_files import tensors_hash
from rwkv_rlhf.data.batch import PairExample, RatedExample, TextExample
from rwkv_rlhf.data.joined_documents import ContextWarmup, JoinedDocuments
from rwkv_rlhf.data.opening import (
    Reading,
    is_rated,
    kind_of,
    open_h5,
    open_pairs,
    open_rated,
    open_slices,
    open_text,
    unpair,
)
from rwkv_rlhf.data.pairs.dataset import Pairs
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.data.prompts import Prompts, open_prompts
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sampler import (
    MagicPrime,
    MixedSteps,
    Order,
    RandomSlices,
    Sequential,
    Shuffled,
    Steps,
    check_magic_prime,
)
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.split import Subset, split
from rwkv_rlhf.data.text.documents import Texts, text_type
from rwkv_rlhf.data.text.h5 import H5Texts
from rwkv_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.layers.placing import Layout, matrices
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.model.layout import packs
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.rl.algorithm import Algorithm
from rwkv_rlhf.rl.held_out import held_out_figures, held_out_samples
from rwkv_rlhf.rl.loop import PromptSteps, Rollouts
from rwkv_rlhf.rl.rewards import ModelReward, Rewards, open_rewards
from rwkv_rlhf.rl.start_values import StartValues
from rwkv_rlhf.scoring.divergence import Divergence
from rwkv_rlhf.scoring.evaluation import (
    decisive_margins,
    evaluate_text,
    evaluating,
    pair_figures,
    rated_figures,
    score_pairs,
)
from rwkv_rlhf.scoring.reference import reference_scores
from rwkv_rlhf.scoring.reward_model import RewardModel, open_reward_model
from rwkv_rlhf.scoring.rewards import SCORE_HEAD, margins_of, pair_rewards, reward_figures
from rwkv_rlhf.scoring.wrong_pairs import wrong_pairs
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import trains_on_text
from rwkv_rlhf.settings.eval_tasks import eval_tasks
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.shapes import SHAPES
from rwkv_rlhf.tasks.measure import measure
from rwkv_rlhf.tasks.text_model import TextModel
from rwkv_rlhf.training.start import Start

log = logging.getLogger(__name__)


def unbalanced(rated: Pairs, desirable: float, undesirable: float) -> Iterator[str]:
    """A sentence when the weights of good and bad answers are far from what KTO's paper advises."""
    good = sum(isinstance(example, RatedExample) and example.good for example in rated)
    bad = len(rated) - good
    ratio = desirable * good / max(1e-9, undesirable * bad)
    if bad and good and not 0.9 <= ratio <= 1.5:
        yield (
            f"the good answers together weigh {ratio:.2g} times as much as the bad ones; 1 to 1.33 is advised: set "
            f"--kto_desirable_weight {undesirable * bad / good:.3g} or --kto_undesirable_weight "
            f"{desirable * good / bad:.3g}"
        )


def one_class(rated: Sequence[Any], what: str) -> str:
    """A sentence when rated answers are all good or all bad; "" when both are there. `what`: which answers."""
    kinds = {example.good for example in rated if isinstance(example, RatedExample)}
    if len(kinds) != 1:
        return ""
    here, lacking = ("good", "bad") if kinds == {True} else ("bad", "good")
    return f"all {len(rated)} {what} are {here} ones: KTO learns and is judged by both, so {lacking} ones are missing"


class Inputs:
    """Opens the files that `config` names, for the model of `start`. Every reader raises ValueError with file:line."""

    def __init__(self, config: Config, start: Start, folder: Path) -> None:
        self.config = config
        self.start = start
        self.folder = folder
        self.reports: list[DataReport] = []
        self.split_off: Subset | None = None  # what --val_split took from the training examples
        self.wrong: dict[str, Any] = {}  # held-out pairs that the model had wrong when they were last scored

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The World vocabulary, or --vocab_file."""
        return load_tokenizer(self.start.sizes.vocab_size, self.config.vocab_file or None)

    def _reading(self, *kinds: str) -> Reading:
        """How rows are read: --format where it names a shape of these kinds, --thinking."""
        c = self.config
        named = c.format if c.format and SHAPES[c.format].kind in kinds else ""
        return Reading(named, c.thinking == "drop")

    def _pairs(self, path: str, *, cap: bool) -> Pairs:
        """Preference pairs or rated answers, as the file has them."""
        c = self.config
        options: dict[str, Any] = {
            "template": c.template,
            "max_len": c.rlhf_max_corpus_len if cap else 0,
            "ctx_len": c.ctx_len if cap else 0,
            "skip_bad": c.skip_bad,
            "reading": self._reading("pairs", "rated"),
        }
        if is_rated(path, options["reading"].shape):
            pairs = open_rated(path, self.tokenizer, **options)
        else:
            pairs = open_pairs(path, self.tokenizer, drop_ties=c.drop_ties, **options)
        self.reports.append(pairs.report)
        return pairs

    def _training_pairs(self, score: bool) -> Pairs:
        """--rlhf_train_file as the loss wants it, with reference scores if it needs them and `score`."""
        c = self.config
        pairs, kind = self._pairs(c.pair_file, cap=True), c.loss_facts.data
        rated = isinstance(pairs[0], RatedExample)
        if kind == "pairs" and rated:
            raise ValueError(f"{c.pair_file} holds single answers with a label: they train with --kto 1 only")
        if kind == "rated":
            pairs = pairs if rated else unpair(pairs)
            for sentence in unbalanced(pairs, c.kto_desirable_weight, c.kto_undesirable_weight):
                log.info(sentence)
            if sentence := one_class(pairs, "answers of the training data"):
                log.warning(sentence)
        if self.judges:
            margins_of(pairs, c)
            return pairs.judged()
        if score and c.loss_facts.reference:
            return pairs.with_reference(self.reference(pairs, c.trust_reference).tolist())
        return pairs

    def _texts(self, path: str, *, cut: bool, data_type: str = "", teacher: bool = False) -> Texts | H5Texts:
        c = self.config
        how: dict[str, Any] = {"train_on_prompt": c.train_on_prompt, "skip_bad": c.skip_bad}
        how["ctx_len"] = c.ctx_len if cut else 0
        texts: Texts | H5Texts
        if text_type(path, data_type) == "h5":  # already tokenised
            how |= {"teacher": teacher, "top_k": c.top_k if "top_k" in c.given else 0}
            alone = sources_of(path)[0].path
            texts = open_h5(alone, self.start.sizes.vocab_size, shown=c.enable_progress_bar, **how)
        else:
            kinds = ("text", "pairs") if c.train_on_chosen else ("text",)
            reading = self._reading(*kinds)
            if c.train_on_chosen:
                reading = dataclasses.replace(reading, chosen=True, spare_reject=True)
            how |= {"data_type": data_type, "template": c.template, "reading": reading}
            texts = open_text(path, self.tokenizer, **how)
        self.reports.append(texts.report)
        return texts

    def _prompts(self, path: str, *, cap: bool) -> Prompts:
        """Prompts, as the file has them."""
        c = self.config
        prompts = open_prompts(
            path,
            self.tokenizer,
            template=c.template,
            max_len=c.rlhf_max_corpus_len if cap else 0,
            skip_bad=c.skip_bad,
            drop_thinking=c.thinking == "drop",
        )
        self.reports.append(prompts.report)
        return prompts

    @cached_property
    def algorithm(self) -> Algorithm:
        """What samples answers and judges them, of a loss on prompts."""
        algorithm: Algorithm = load(self.config.loss_facts.algorithm)(self.config)
        return algorithm

    @cached_property
    def rewards(self) -> Rewards:
        """What --reward_funcs and --reward_model say of answers. The model is loaded when it is first asked for."""
        c = self.config
        models = {"reward_model": ModelReward(self._reward_model(c.reward_model))} if c.reward_model else {}
        return open_rewards(c, models)

    def _reward_model(self, path: str) -> RewardModel:
        begun, chunk = self.start, self.config.chunk
        return open_reward_model(path, self._as_computed(), begun.sizes.vocab_size, bases=[begun.path], chunk=chunk)

    def _as_computed(self) -> BuildOptions:
        """How a model beside the one that trains is made: where and as that computes."""
        model, device = self.start.model, device_for(self.config.accelerator)
        return BuildOptions(model.compute_dtype, device=device, wkv_backend=model.wkv_backend, ways=model.ways)

    @cached_property
    def sampler(self) -> Sampler:
        """Asks the model of the moment."""
        return Sampler(self.start.model, self.tokenizer)

    def tasks(self) -> Callable[[], dict[str, float]] | None:
        """--eval_tasks as a function that measures the model of the moment; None without any."""
        tasks = eval_tasks(self.config.eval_tasks)
        if not tasks:
            return None
        model = TextModel(self.start.model, self.tokenizer)
        return lambda: measure(tasks, model, self.config.eval_limit)

    def rollouts(self, steps: PromptSteps) -> Rollouts:
        """Who answers the prompts of `steps`; the model must still be what the run begins from."""
        begun = StartValues(self.start.model) if self.algorithm.needs_reference else None
        return Rollouts(self.config, self.algorithm, self.rewards, self.sampler, steps, begun)

    def training(self, score: bool = True) -> Steps | MixedSteps | PromptSteps:
        """The training examples as optimizer steps; pairs with their reference scores if `score`."""
        c = self.config
        examples: Any
        if c.loss_facts.data == "prompts":
            examples = self._prompts(c.pair_file, cap=True)
            order = self._shuffled(len(examples))
        elif c.loss_facts.data != "text":
            examples = self._training_pairs(score)
            order = self._shuffled(len(examples))
        else:
            examples, order = self._training_text()
        self._say_report()
        if c.val_split > 0:
            if not isinstance(examples, Pairs | Prompts | Texts | H5Texts):
                raise ValueError("--val_split works on documents and pairs, not on slices of a corpus: give --val_file")
            if isinstance(examples, Pairs):
                examples.check_prompts("{val_split}")
            examples, self.split_off = split(examples, c.val_split, c.seed)
            order = self._shuffled(len(examples))
            log.info("--val_split: %d examples train, %d are held out", len(examples), len(self.split_off))
        world = c.num_nodes * c.devices if c.dry_run else ranks.world_size()
        size = (c.micro_bsz, c.accumulate_grad_batches, ranks.rank(), world)
        if c.loss_facts.data == "prompts":
            return PromptSteps(examples, order, *size, self.algorithm.cycle().passes)
        if c.loss_facts.data == "text":
            return Steps(*self._samples(examples, order), *size, self._growing())
        steps = Steps(examples, order, *size)
        if not trains_on_text(c):
            return steps
        text = self._training_text()
        self._say_report()
        return MixedSteps(steps, Steps(*self._samples(*text), *size, self._growing()))

    def _training_text(self) -> tuple[Any, Order]:
        """--data_file as examples and their order."""
        c = self.config
        if text_type(c.data_file, c.data_type) == "binidx":
            return self._corpus()
        if c.magic_prime > 0:
            raise ValueError(f"--magic_prime {c.magic_prime} needs a binidx corpus as --train_data_file")
        from_file = c.loss_facts.teacher and not c.teacher_model
        texts = self._texts(c.data_file, cut=True, data_type=c.data_type, teacher=from_file)
        return texts, self._shuffled(len(texts))

    def _say_report(self) -> None:
        for line in [] if self.config.dry_run else self.reports[-1].lines():  # a dry run prints all reports itself
            log.info(line)

    def _shuffled(self, n: int) -> Order:
        return Shuffled(n, self.config.seed) if self.config.random_mode else Sequential(n)

    def _samples(self, examples: Any, order: Order) -> tuple[Any, Order]:
        """Documents of text and their order as samples: --infctx_dataset_multiplier of them to one."""
        c = self.config
        if c.infctx_dataset_multiplier <= 1 and c.reset_state:
            return examples, order
        if not hasattr(examples, "length"):
            raise ValueError(
                "--infctx_dataset_multiplier and --reset_state 0 work on documents, not on slices of a corpus, which "
                "cross the borders of documents anyway"
            )
        seed = c.seed if c.random_mode else None
        joined = JoinedDocuments(examples, c.infctx_dataset_multiplier, c.ctx_len, seed, c.reset_state)
        log.info("%d documents joined into %d samples of at most %d tokens", len(examples), len(joined), c.ctx_len)
        return joined, self._shuffled(len(joined))

    def _growing(self) -> ContextWarmup | None:
        """--initial_ctx_len: how long samples are at each step."""
        c = self.config
        if not c.initial_ctx_len:
            return None
        log.info(
            "samples grow from %d to %d tokens in %d steps; longer ones are cut until then",
            *(c.initial_ctx_len, c.ctx_len, c.ctx_warmup_steps),
        )
        return ContextWarmup(c.initial_ctx_len, c.ctx_len, c.ctx_warmup_steps)

    def _corpus(self) -> tuple[Any, Order]:
        """binidx: every slice once per pass by the magic prime (stage 3 or --magic_prime), else random slices."""
        c = self.config
        stateless = c.train_stage in (2, 3) or c.magic_prime > 0
        slices, report = open_slices(
            sources_of(c.data_file)[0].path, self.start.sizes.vocab_size, c.ctx_len, c.ctx_len if stateless else 1
        )
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
        if known:
            log.info(
                "reference scores in %s belong to another model or setting: computing them again", pairs.report.source
            )
        return self._computed_reference(pairs)

    def _computed_reference(self, pairs: Sequence[PairExample]) -> Tensor:
        """(n, 2) summed log-probabilities under the reference model, from the cache of the project folder if there."""
        c = self.config
        model, model_hash, layout = self.start.model, self.start.hash, self.start.report.layout
        if c.reference_model:
            model, layout = self._foreign_model(c.reference_model)
            model_hash = file_hash(c.reference_model)
        held = [layout.store, *sorted(layout.packed), "masters", *sorted(layout.trained), str(model.emb.weight.device)]
        if initial := initial_factors(model):  # PiSSA's start model is the packed residual and these
            held.append(tensors_hash(initial))
        with progress_bar(len(pairs), "reference", c.enable_progress_bar) as done:
            return reference_scores(
                model,
                pairs,
                model_hash=model_hash,
                arithmetic=" ".join(held),
                folder=self.folder,
                head_chunk=c.head_chunk,
                chunk=c.chunk,
                progress=done,
            )

    def _same_reference(self, about: dict[str, Any]) -> bool:
        """Whether a sidecar speaks of this base model, in this arithmetic, of answers cut as here."""
        model, layout = self.start.model, self.start.report.layout
        storage = layout.store if layout.packed else "none"
        whole = not layout.packed or layout.packed >= {name for name, layer in matrices(model) if packs(name, layer)}
        return (
            about.get("reference") == "sum"
            and about.get("model") == self.start.hash
            and about.get("precision") == self.config.precision
            and about.get("storage", "none") == storage
            and whole  # a file has all matrices in one storage
            and not needs_initial_factors(layout.modes)
        )

    def _foreign_model(self, path: str) -> tuple[RWKV, Layout]:
        """--reference_model, for as long as it is needed."""
        model, report = load_model(path, self._as_computed())
        if model.sizes.vocab_size != self.start.sizes.vocab_size:
            raise ValueError(
                f"--reference_model {path} has a vocabulary of {model.sizes.vocab_size}, "
                f"the model one of {self.start.sizes.vocab_size}"
            )
        return model, report.layout

    @property
    def judges(self) -> bool:
        """Whether answers are judged by a score head: with --rm 1, or when a reward model is evaluated."""
        named = self.config.loss_facts.scalar_head == SCORE_HEAD
        return named or (not self.config.loss and self.start.model.scalar_head(SCORE_HEAD) is not None)

    def held_out(self, *, reference: bool) -> Callable[[], dict[str, Any]] | None:
        """The held-out examples as a function that scores them under the model of the moment; None without any.

        They are --val_file, or what --val_split took. Pairs are compared with their reference scores, taken now, if
        `reference`; otherwise the preference is raw.
        """
        c = self.config
        if c.loss_facts.data == "prompts":
            return self._held_out_prompts()
        if self.split_off is not None:
            if isinstance(self.split_off[0], TextExample):
                return self._held_out_texts(self.split_off)
            pairs = [example for example in self.split_off if isinstance(example, PairExample)]
            if self.judges:
                return self._held_out_rewards(pairs)
            known = [pair.reference for pair in pairs]
            if c.loss_facts.reference and None not in known:  # then they were looked at, or computed
                return self._held_out_pairs(pairs, torch.tensor(known))
            return self._held_out_pairs(pairs, self._computed_reference(pairs) if reference else None)
        if not c.val_file:
            return None
        if kind_of(c.val_file, shape=c.format) == "text":
            return self._held_out_texts(self._texts(c.val_file, cut=False))
        file = self._pairs(c.val_file, cap=False)
        if self.judges and not isinstance(file[0], RatedExample):
            return self._held_out_rewards(file)
        return self._held_out_pairs(file, self.reference(file) if reference else None)

    def _held_out_rewards(self, pairs: Sequence[PairExample]) -> Callable[[], dict[str, Any]]:
        """Scores of a reward model. Raises ValueError where there is none: nothing has trained its head."""
        c, start = self.config, self.start
        if c.eval_only and not c.load_adapter and SCORE_HEAD not in file_sizes(start.path).heads:
            raise ValueError(
                f"{{eval_only}} 1 with {{rm}} 1: {start.path} is no reward model (it has no {SCORE_HEAD}.weight): give "
                "a merged one, or its checkpoint with {load_adapter}"
            )
        margins = margins_of(pairs, c)

        def score() -> dict[str, Any]:
            with evaluating(start.model):
                rewards = pair_rewards(start.model, pairs, chunk=c.chunk)
            self.wrong = wrong_pairs(pairs, rewards.margin(), self.tokenizer.decode)
            return reward_figures(rewards, margins, c)

        return score

    def _held_out_prompts(self) -> Callable[[], dict[str, Any]] | None:
        """The rewards of one answer to each held-out prompt."""
        c, found = self.config, self.split_off
        if found is None and not c.val_file:
            return None
        prompts: Any = self._prompts(c.val_file, cap=True) if found is None else found
        params = self.algorithm.sampling()
        return lambda: held_out_figures(held_out_samples(self.sampler, prompts, self.rewards, params, c))

    def _held_out_texts(self, texts: Subset | Texts | H5Texts) -> Callable[[], dict[str, Any]]:
        def score() -> dict[str, Any]:
            examples = (texts[index] for index in range(len(texts)))  # read anew each time, not kept
            documents = (example for example in examples if isinstance(example, TextExample))
            with evaluating(self.start.model):
                return evaluate_text(self.start.model, documents, self.config.head_chunk)

        return score

    def _held_out_pairs(self, pairs: Sequence[PairExample], base: Tensor | None) -> Callable[[], dict[str, Any]]:
        """Scores against the reference scores `base` (n, 2), and how far the policy went from the reference."""
        c, model = self.config, self.start.model
        loss = LOSSES[c.loss or tables.PRETRAINING]
        good = torch.tensor([pair.good for pair in pairs if isinstance(pair, RatedExample)])
        if sentence := one_class(pairs, "held-out answers"):
            log.warning(sentence)
        if len(good) and base is None and not good.any():
            raise ValueError("the held-out answers are all bad ones: without a reference there is nothing to score")
        distance: Divergence | None = None
        if base is not None:
            reference = self._foreign_model(c.reference_model)[0] if c.reference_model else model
            with evaluating(reference):
                distance = Divergence(reference, pairs, c.seed, c.chunk)
            log.info(
                "held out: kl is KL(policy || reference) of the next token, exact at %d positions of %d chosen answers",
                len(distance.positions),
                distance.pairs,
            )

        def score() -> dict[str, Any]:
            with evaluating(model):
                scores = score_pairs(model, pairs, head_chunk=c.head_chunk, chunk=c.chunk)
                near = {} if distance is None else {"kl": distance.of(model)}
            if len(good):
                return rated_figures(scores, good, base, c) | near
            self.wrong = wrong_pairs(pairs, decisive_margins(scores, base, loss, c), self.tokenizer.decode)
            return pair_figures(scores, base, loss, c) | near

        return score
