"""The built-in templates: their shares in `mixed`, and G1's cues."""

import random
from collections import Counter

import pytest

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.templates.jinja_process import compiled
from rwkv_rlhf.data.templates.named import draw_template
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.generation.answers import after_cue


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


def test_g1h_by_hand():
    """What RWKV's own engine writes for G1h: a model is asked in another form than it knows if this breaks."""
    (share,) = TEMPLATES["g1h"]
    flower, asked = share.template, [Turn("system", "Be kind."), Turn("user", "Hi")]
    assert flower.history(asked[1:]) == "User\u273fHi\u273f"
    assert flower.prompt(asked) == "System\u273fBe kind.\u273f\nUser\u273fHi\u273f\nBot\u273f<think"
    thought, plain = "<think>\nhm\n</think>\nYes", "Yes"
    assert "".join([flower.prompt(asked, [thought]), *flower.render(asked, [thought]).answers]) == (
        "System\u273fBe kind.\u273f\nUser\u273fHi\u273f\nBot\u273f<think>\nhm\n</think>\nYes\u273f"
    )
    prompt, (answer,) = flower.render(asked, [plain])
    assert prompt.endswith("Bot\u273f<think></think") and answer == ">Yes\u273f" and after_cue(prompt, ">Yes") == "Yes"
    assert flower.render(asked, [thought, plain]).answers == [f"{thought}\u273f", "Yes\u273f"]
    chat = [*asked, Turn("assistant", "Yes"), Turn("user", "Bye"), Turn("assistant", "Bye")]
    spans = list(flower.spans(chat))
    assert "".join(span.text for span in spans).endswith(
        "\u273f\nUser\u273fBye\u273f\nBot\u273f<think></think>Bye\u273f"
    )
    assert [span.text for span in spans if span.answer] == [">Yes\u273f", ">Bye\u273f"]
    one, two = (f"\n<tool_response>\n{said}\n</tool_response>" for said in "34")
    assert flower.history([Turn("tool", "3")]) == f"User\u273f{one}\u273f"
    called = [Turn("user", "Hi"), Turn("tool", "3"), Turn("tool", "4"), Turn("user", "Bye")]
    text = f"User\u273fHi\u273f\nUser\u273f{one}{two}\u273f\nUser\u273fBye\u273f"
    assert flower.history(called) == text
    messages = [{"role": turn.role, "content": turn.text} for turn in called]
    assert compiled(flower.as_jinja()).render(messages=messages) == text
    with pytest.raises(RowError, match="holds \u273f, which ends a turn"):
        flower.render([Turn("user", "a \u273f flower")], ["Yes"])
