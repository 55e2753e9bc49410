"""The built-in templates: their shares in `mixed`, and G1's cues."""

import random
from collections import Counter

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates.named import draw_template
from rwkv_rlhf.data.templates.template import TEMPLATES


def test_mixed_shares():
    """80/10/10, drawn from one seed."""
    rng = random.Random(100)
    counts = Counter(draw_template("mixed", rng).user for _ in range(4000))
    assert abs(counts["User"] / 4000 - 0.8) < 0.03
    assert abs(counts["Question"] / 4000 - 0.1) < 0.02
    assert counts.total() == counts["User"] + counts["Question"] + counts["Input"]


def test_g1_cues():
    """Thoughts follow ` <think`; answers without thoughts follow an empty thought."""

    def written(answers, number):
        prompt, answers = TEMPLATES["g1"][0].template.render([Turn("user", "Hi")], answers)
        return prompt, prompt + answers[number]

    think, plain = ["<think>\nhm\n</think>\nYes", "<think></think>No"], ["Yes", "No"]
    whole = "User: Hi\n\nAssistant: <think>\nhm\n</think>\nYes\n\n"
    assert written(think, 0) == ("User: Hi\n\nAssistant: <think", whole)
    assert written(plain, 1)[1] == "User: Hi\n\nAssistant: <think>\n</think>\nNo\n\n"
    both = [think[0], "No"]
    assert written(both, 1)[1] == "User: Hi\n\nAssistant: No\n\n"
