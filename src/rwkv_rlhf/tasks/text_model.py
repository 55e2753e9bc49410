"""A model as evaluation tasks ask it: by texts. Every text stands behind the end of a document, as RWKV's do."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_rlhf.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from rwkv_rlhf.generation.prefixes import PrefixCache
from rwkv_rlhf.generation.rows import Request
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.tasks.continuations import Asked, Ids, Likelihood, likelihoods

AT_ONCE = 64  # answers that are sampled together


class Question(NamedTuple):
    """A text to go on from, and how."""

    context: str
    params: SamplingParams


class TextModel:
    """Answers the three kinds of questions of lm-evaluation-harness, and those of tasks of our own."""

    def __init__(self, model: RWKV, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str) -> Ids:
        """The ids of a text from its beginning."""
        return (END_OF_DOCUMENT, *self.tokenizer.encode(text))

    def pair(self, context: str, continuation: str) -> Asked:
        """The ids of a context and of what follows it.

        White space at the end of the context belongs to what follows, and the two are tokenised together, as the
        harness does for every model: so its figures compare.
        """
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before = self.ids(context)
        return Asked(before, self.ids(context + continuation)[len(before) :])

    def apart(self, context: str, continuation: str) -> Asked:
        """The ids of both, each tokenised by itself."""
        return Asked(self.ids(context), tuple(self.tokenizer.encode(continuation)))

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood]:
        """Of each continuation after its context."""
        return likelihoods(self.model, asked)

    def whole(self, texts: Sequence[str]) -> list[float]:
        """Log-probabilities of whole texts of any length in nats, without a window: the state carries on."""
        asked = [Asked((END_OF_DOCUMENT,), tuple(self.tokenizer.encode(text))) for text in texts]
        return [one.logp for one in likelihoods(self.model, asked)]

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model goes on with, up to and without a stop text. What the contexts begin with alike runs once."""
        prompts = [self.ids(question.context) for question in questions]
        prefixes = PrefixCache(self.model)
        prefixes.add_common(prompts)
        rests = [prefixes.find(prompt) for prompt in prompts]
        requests = [
            Request(rest.prompt, question.params, sequence_seed(question.params.seed, number), number, rest.state)
            for number, (rest, question) in enumerate(zip(rests, questions))
        ]
        sampler = Sampler(self.model, self.tokenizer)
        done = sampler.stream(deque(requests), at_once=AT_ONCE)
        texts = {one.request.key: one.completion.text for one in done}
        return [texts[number] for number in range(len(questions))]
