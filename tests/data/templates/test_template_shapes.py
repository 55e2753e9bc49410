"""Chat templates in the forms of published models, in our own words: what they write, and which of it is learnt.

The judge is the library whose format this is: its masks of the assistant's tokens, and its own rendering of tools.
"""

import json
from itertools import groupby

import pytest

from rwkv_rlhf.data.conversation import TOOLS, Turn
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.templates.jinja import load_chat_template
from rwkv_rlhf.data.templates.named import say_plain_marks
from rwkv_rlhf.data.templates.template import WORLD
from rwkv_rlhf.data.text.documents import tokenise_chat

LOOP = "{% for m in messages %}"
# name -> (template, special tokens); `generation` marks what the model says
FORMS = {
    "chatml": (
        LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        {},
    ),
    "headers": (
        "{{ bos_token }}" + LOOP + "{{ '<|start|>' + m.role + '<|stop|>\\n\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim }}<|eot|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}",
        {"bos_token": "<|begin|>"},
    ),
    "brackets": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "turns": (
        "{{ bos_token }}" + LOOP + "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</turn>{% endgeneration %}{% else %}"
        "{{ m.content }}</turn>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
        {"bos_token": "<bos>"},
    ),
    "marks": (
        LOOP + "{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        {"eos_token": "<|endoftext|>"},
    ),
    "marks in one line": (
        LOOP + "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        {"eos_token": "<|endoftext|>"},
    ),
    "names": (
        LOOP + "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[m.role] }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        {"eos_token": "</s>"},
    ),
    "instruction": (
        LOOP + "{% if m.role == 'assistant' %}{{ '### Response:\\n' }}{% generation %}{{ m.content + '\\n' }}"
        "<|EOT|>{% endgeneration %}{{ '\\n' }}{% else %}{{ '### Instruction:\\n' + m.content + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
        {},
    ),
    "rwkv": (
        "{{ bos_token }}" + LOOP + "{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[m.role] + ':' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content }}{{ '\\n\\n' }}{% endgeneration %}{% else %}"
        "{{ ' ' + m.content + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        {"bos_token": "<|rwkv_tokenizer_end_of_text|>", "eos_token": "\n\n"},
    ),
    "dated": (
        "{{ strftime_now('%Y') }} " + LOOP + "{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        {},
    ),
}
SAID = [("user", "Name a bird."), ("assistant", "The wren."), ("user", "And a fish?"), ("assistant", "The pike.")]
TURNS = [Turn(*one) for one in SAID]
MESSAGES = [{"role": role, "content": text} for role, text in SAID]


def load(folder, source, special):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": source} | special))
    return load_chat_template.__wrapped__(str(path))


def characters(special):
    """The judge's tokenizer: a token is a character, so that its masks are masks of the text."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(c): c for c in range(1, 256)}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, split_special_tokens=True, **special)


@pytest.mark.parametrize("name", FORMS)
def test_masks_are_those_of_the_library(name, tmp_path):
    """The text is the library's, letter for letter, and what is learnt is what its own mask names."""
    source, special = FORMS[name]
    form, judge = load(tmp_path, source, special), characters(special)
    said = judge.apply_chat_template(
        MESSAGES, chat_template=source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    text = judge.apply_chat_template(MESSAGES, chat_template=source, tokenize=False)
    spans = list(form.spans(TURNS))
    assert "".join(span.text for span in spans) == text and len(said["assistant_masks"]) == len(text)
    runs = groupby(zip(text, said["assistant_masks"]), key=lambda pair: pair[1])
    wanted = ["".join(letter for letter, _ in run) for masked, run in runs if masked]
    learnt = [span.text for span in spans if span.answer]
    # the library's mask ends with the closing mark; ours goes on to where the user begins, or to the end
    behind = [ours.removeprefix(theirs) for ours, theirs in zip(learnt, wanted, strict=True)]
    assert set(behind) <= {"", "\n", form.final, f"\n{form.final}"}


@pytest.mark.parametrize("name", ["marks", "marks in one line"])
def test_a_mark_behind_the_whole_is_no_part_of_a_turn(name, tmp_path):
    """Phi's templates end what they render with a mark that they take back when the chat goes on."""
    form = load(tmp_path, *FORMS[name])
    assert (form.final, form.end) == ("<|endoftext|>", "<|end|>")
    text = "".join(span.text for span in form.spans(TURNS))
    assert text.count("<|endoftext|>") == 1 and text.endswith("<|endoftext|>")


def test_special_tokens_become_their_ids(tmp_path, world):
    """The mark of RWKV's configurations is id 0, not the text of its name; what the vocabulary lacks is said once."""
    form = load(tmp_path, *FORMS["rwkv"])
    ids = tokenise_chat(TURNS, form, world).tokens.tolist()
    assert ids[0] == 0 and world.decode(ids[1:]) == "".join(map(WORLD._turn, TURNS))
    report = DataReport("")
    say_plain_marks(str(tmp_path / "tokenizer_config.json"), world, report)
    assert not report.notices
    (tmp_path / "other").mkdir()
    load(tmp_path / "other", *FORMS["brackets"])
    say_plain_marks(str(tmp_path / "other" / "tokenizer_config.json"), world, report)
    assert len(report.notices) == 1 and "<s>, </s>: plain text in this vocabulary" in report.notices[0]


CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Cork"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "tide", "description": "When?", "parameters": {"type": "object"}}}
WITH_TOOLS = [
    Turn(TOOLS, json.dumps([TOOL])),
    Turn("system", "Be brief."),
    Turn("user", "High tide in Cork?"),
    Turn("assistant", f"I look.\n{CALL}"),
    Turn("tool", "06:12"),
    Turn("assistant", "At 06:12."),
]
TOOLED = (
    "{% if tools %}TOOLS {% for t in tools %}{{ t | tojson(false, 1) }}{% endfor %}{{ '\\n' }}{% endif %}"
    + LOOP
    + "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tools_in_a_templates_own_form(tmp_path):
    """A template that knows calls gets them apart, as from the library; only what the model says is learnt."""
    judge = characters({})
    call = {"id": "call00001", "type": "function", "function": {"name": "tide", "arguments": {"port": "Cork"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "High tide in Cork?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "06:12", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "At 06:12."},
    ]
    wanted = judge.apply_chat_template(messages, tools=[TOOL], chat_template=TOOLED, tokenize=False)
    spans = list(load(tmp_path, TOOLED, {}).spans(WITH_TOOLS))
    assert "".join(span.text for span in spans) == wanted
    learnt = [span.text for span in spans if span.answer]
    assert learnt == ['I look.[call00001 tide {"port": "Cork"}]</s>', "At 06:12.</s>"]


def test_tools_as_text(tmp_path):
    """Templates without a form of their own, and World: tools in the system text, calls and results as text."""
    spans = list(WORLD.spans(WITH_TOOLS))
    assert [span.text for span in spans if span.answer] == [f" I look.\n{CALL}\n\n", " At 06:12.\n\n"]
    text = "".join(span.text for span in spans)
    assert text.startswith("System: Be brief.\nThese tools can be called") and text.count("System:") == 1
    assert json.dumps(TOOL) in text and "\n\nTool: 06:12\n\nAssistant:" in text
    form = load(tmp_path, FORMS["chatml"][0], {})
    text = "".join(span.text for span in form.spans(WITH_TOOLS))
    assert "<|im_start|>system\nBe brief.\nThese tools" in text and f"I look.\n{CALL}<|im_end|>" in text


def test_the_time_is_the_same_for_a_whole_run(tmp_path):
    """A prompt that is written anew at each second would never be the same twice."""
    form = load(tmp_path, "{{ strftime_now('%H:%M:%S.%f') }}" + FORMS["chatml"][0], {})
    assert form.history(TURNS) == form.history(TURNS)
