"""Rows of every shape in our own words, what each must become (written by hand), and each with one thing wrong.

`becomes` is the stable form that `convert_data.py` writes.
"""

from typing import Any, NamedTuple


class Sample(NamedTuple):
    """A row, and the objects that it becomes."""

    row: dict[str, Any]
    becomes: list[dict[str, Any]]


class Wrong(NamedTuple):
    """A row with one thing wrong, and words of the sentence about it."""

    row: dict[str, Any]
    says: str


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | more


HEN = [user("How many legs has a hen?"), said("Two.")]
ASKED = {"messages": [user("Name a bird.")], "chosen": "The wren.", "rejected": "A stone."}
CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Cork"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}

SAMPLES: dict[str, list[Sample]] = {
    "text": [
        Sample({"text": " The tide\n\ncomes in. "}, [{"text": " The tide\n\ncomes in. "}]),
    ],
    "messages": [
        Sample(chat(*HEN), [chat(*HEN)]),
        Sample(
            {"messages": [{"role": "developer", "content": "Be brief.\r\n\r\nAlways."}, *HEN]},
            [chat(system("Be brief.\nAlways."), *HEN)],
        ),
        Sample(
            chat(
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "How many legs"}, {"type": "text", "text": "has a hen?"}],
                },
                said("Two."),
            ),
            [chat(user("How many legs\nhas a hen?"), said("Two."))],
        ),
        Sample(
            chat(
                user("2 + 2?"),
                {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
                user("Sure?"),
                {"role": "assistant", "content": "Yes", "weight": 0},
            ),
            [
                chat(
                    user("2 + 2?"),
                    {**said("4"), "thinking": "two and two"},
                    user("Sure?"),
                    {**said("Yes"), "weight": 0},
                )
            ],
        ),
        Sample(
            chat(
                user("When is high tide in Cork?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Cork"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "tide", "content": "06:12"},
                said("At 06:12."),
                tools=[TOOL],
            ),
            [
                chat(
                    user("When is high tide in Cork?"),
                    said(CALL),
                    {"role": "tool", "content": "06:12"},
                    said("At 06:12."),
                    tools=[TOOL],
                )
            ],
        ),
        Sample(
            chat(
                {"role": "user", "content": [{"type": "text", "value": "When is high tide in Cork?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "I look it up."},
                        {"type": "tool_call", "value": '{"name": "tide", "arguments": {"port": "Cork"}}'},
                    ],
                    "loss_weight": 1.0,
                },
            ),
            [chat(user("When is high tide in Cork?"), {**said(CALL), "thinking": "I look it up."})],
        ),
        Sample({"system": "Be kind.", **chat(*HEN)}, [chat(system("Be kind."), *HEN)]),
        Sample({"system": float("nan"), **chat(*HEN)}, [chat(*HEN)]),
        Sample({"system": "NaN", **chat(*HEN)}, [chat(*HEN)]),
    ],
    "sharegpt": [
        Sample(
            {
                "id": "a1",
                "conversations": [
                    {"from": "human", "value": "How many legs has a hen?"},
                    {"from": "gpt", "value": "Two."},
                ],
                "system": "",
            },
            [chat(*HEN)],
        ),
        Sample(
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "When is high tide in Cork?"},
                    {"from": "function_call", "value": '{"name": "tide", "arguments": {"port": "Cork"}}'},
                    {"from": "observation", "value": "06:12"},
                    {"from": "gpt", "value": "At 06:12."},
                ],
                "tools": '[{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}]',
            },
            [
                chat(
                    system("Be brief."),
                    user("When is high tide in Cork?"),
                    said(CALL),
                    {"role": "tool", "content": "06:12"},
                    said("At 06:12."),
                    tools=[TOOL],
                )
            ],
        ),
        Sample({"conversation": [{"human": "How many legs has a hen?", "assistant": "Two."}]}, [chat(*HEN)]),
    ],
    "completion": [
        Sample({"prompt": "How many legs has a hen?", "completion": "Two."}, [chat(*HEN)]),
        Sample({"prompt": [HEN[0]], "completion": [HEN[1]]}, [chat(*HEN)]),
    ],
    "alpaca": [
        Sample(
            {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
            [chat(user("Add the numbers.\n2 and 3"), said("5"))],
        ),
        Sample(
            {
                "instruction": "And times two?",
                "input": "",
                "output": "10",
                "system": "Count.",
                "history": [["2 and 3?", "5"]],
            },
            [chat(system("Count."), user("2 and 3?"), said("5"), user("And times two?"), said("10"))],
        ),
    ],
    "dolly": [
        Sample(
            {
                "instruction": "Who swims?",
                "context": "The otter swims, the hen walks.",
                "response": "The otter.",
                "category": "closed_qa",
            },
            [chat(user("Who swims?\nThe otter swims, the hen walks."), said("The otter."))],
        )
    ],
    "query": [Sample({"query": "How many legs has a hen?", "response": "Two."}, [chat(*HEN)])],
    "question": [Sample({"question": "How many legs has a hen?", "answer": "Two."}, [chat(*HEN)])],
    "response": [Sample({"prompt": "How many legs has a hen?", "response": "Two."}, [chat(*HEN)])],
    "input_output": [Sample({"input": "How many legs has a hen?", "output": "Two."}, [chat(*HEN)])],
    "preference": [
        Sample({"prompt": "Name a bird.", "chosen": "The wren.", "reject": "A stone."}, [ASKED]),
        Sample(
            {"system": "Be brief.", "question": "Name a bird.", "chosen": "The wren.", "rejected": "A stone."},
            [{**ASKED, "messages": [system("Be brief."), *ASKED["messages"]]}],
        ),
        Sample(
            {"chosen": [user("Name a bird."), said("The wren.")], "rejected": [user("Name a bird."), said("A stone.")]},
            [ASKED],
        ),
        Sample(
            {"prompt": [user("Name a bird.")], "chosen": [said("The wren.")], "rejected": [said("A stone.")]}, [ASKED]
        ),
        Sample(
            {"prompt": "Name a bird.", "chosen_messages": [said("The wren.")], "rejected_messages": [said("A stone.")]},
            [ASKED],
        ),
        Sample(
            {
                "prompt": "Name a bird.",
                "chosen": [user("Name a bird."), said("The wren.")],
                "rejected": [user("Name a bird."), said("A stone.")],
                "messages": [user("Name a bird."), said("The wren.")],
                "score_chosen": 8.5,
                "score_rejected": 2,
            },
            [{**ASKED, "score_chosen": 8.5, "score_rejected": 2.0}],
        ),
        Sample(
            {
                "prompt": "Human: Hello\n\nAssistant: Hello.\n\nHuman: Name a bird.\n\nAssistant:",
                "chosen": "The wren.",
                "rejected": "A stone.",
            },
            [{**ASKED, "messages": [user("Hello"), said("Hello."), user("Name a bird.")]}],
        ),
    ],
    "transcripts": [
        Sample(
            {
                "chosen": "\n\nHuman: Hello\n\nAssistant: Hello.\n\nHuman: Name a bird.\n\nAssistant: The wren.",
                "rejected": "\n\nHuman: Hello\n\nAssistant: Hello.\n\nHuman: Name a bird.\n\nAssistant: A stone.",
            },
            [{**ASKED, "messages": [user("Hello"), said("Hello."), user("Name a bird.")]}],
        )
    ],
    "sharegpt_pairs": [
        Sample(
            {
                "conversations": [{"from": "human", "value": "Name a bird."}],
                "chosen": {"from": "gpt", "value": "The wren."},
                "rejected": {"from": "gpt", "value": "A stone."},
            },
            [ASKED],
        )
    ],
    "alpaca_pairs": [
        Sample(
            {"instruction": "Name one.", "input": "A bird.", "chosen": "The wren.", "rejected": "A stone."},
            [{**ASKED, "messages": [user("Name one.\nA bird.")]}],
        )
    ],
    "openai_pairs": [
        Sample(
            {
                "input": {"messages": [user("Name a bird.")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("The wren.")],
                "non_preferred_output": [said("A stone.")],
            },
            [ASKED],
        )
    ],
    "ranked": [
        Sample(
            {"prompt": "Name a bird.", "responses": ["A stone.", "The wren.", "Wings."], "scores": [1, 9, 4]},
            [
                {**ASKED, "rejected": "Wings.", "score_chosen": 9.0, "score_rejected": 4.0},
                {**ASKED, "score_chosen": 9.0, "score_rejected": 1.0},
            ],
        ),
        Sample(
            {
                "instruction": "Name a bird.",
                "completions": [
                    {"response": "A stone.", "overall_score": 2},
                    {"response": "The wren.", "overall_score": 7},
                ],
            },
            [{**ASKED, "score_chosen": 7.0, "score_rejected": 2.0}],
        ),
        Sample(
            {
                "prompt": "\n\nHuman: Name a bird.\n\nAssistant: ",
                "answers": [{"answer": "The wren.", "rank": 1}, {"answer": "A stone.", "rank": 2}],
            },
            [{**ASKED, "score_chosen": -1.0, "score_rejected": -2.0}],
        ),
    ],
    "rated": [
        *(
            Sample(
                {"prompt": "Name a bird.", "completion": "The wren.", "label": label},
                [chat(user("Name a bird."), completion="The wren.", label=True)],
            )
            for label in (True, 1, 1.0, "true", "1", "good")
        ),
        Sample(
            {"prompt": [user("Name a bird.")], "completion": [said("A stone.")], "label": "bad"},
            [chat(user("Name a bird."), completion="A stone.", label=False)],
        ),
    ],
    "rated_chats": [
        Sample(chat(*HEN, label=False), [chat(HEN[0], completion="Two.", label=False)]),
        Sample(chat(*HEN, kto_tag=True), [chat(HEN[0], completion="Two.", label=True)]),
    ],
    "prompt": [Sample({"prompt": "Name a bird."}, [chat(user("Name a bird."))])],
}

_IMAGE = [{"type": "image_url", "image_url": {"url": "a.png"}}]
_TWO = [system("Be kind."), system("Be brief."), *HEN]

WRONG: dict[str, list[Wrong]] = {
    "text": [
        Wrong({"text": 3}, "text must be a string"),
        Wrong({"text": "a picture of <image>", "images": ["a.png"]}, "the row has images: only text is read"),
        Wrong({"text": "a", "messages": HEN}, "text (documents) and messages"),
    ],
    "messages": [
        Wrong({"messages": "hello"}, "messages must be a list"),
        Wrong({"messages": []}, "messages is empty"),
        Wrong(chat(*_TWO), "two system messages"),
        Wrong(
            {"system": "Be quick.", **chat(system("Be kind."), *HEN)}, "the key system and the system message differ"
        ),
        Wrong(chat(said("Hello."), *HEN), "the assistant speaks first"),
        Wrong(chat(user(" "), said("Two.")), "message 1 is empty"),
        Wrong(
            chat({"role": "user", "content": _IMAGE}, said("Two.")),
            "message 1 holds a part of the type image_url: only text is read",
        ),
        Wrong(
            chat({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, said("Two.")),
            "message 1 holds a part of the type ['text']: only text is read",
        ),
        Wrong(
            chat({"role": "narrator", "content": "x"}),
            "message 1 has the role 'narrator'; one of system, user, assistant, tool",
        ),
        Wrong(chat(user("Hi"), {**said("Hello"), "weight": 0.5}), "message 2 has weight 0.5: only 0 and 1"),
        Wrong(chat(user("Hi"), {"role": "assistant", "content": None}), "message 2 has no text under content"),
        Wrong(chat(user("Hi\0"), said("Hello")), "NUL byte"),
        Wrong({"tools": "none", **chat(*HEN)}, "tools must be a list of tools"),
        Wrong(
            chat(user("Hi"), {"role": "assistant", "tool_calls": [{"id": "c1"}]}),
            "message 2 has a call of a tool without a name",
        ),
    ],
    "sharegpt": [
        Wrong({"conversations": [{"from": "human"}]}, "message 1 has no text under content"),
        Wrong({"conversations": [{"from": "gpt", "value": "Hello."}]}, "the assistant speaks first"),
        Wrong(
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "tide"}]},
            "must hold a call as JSON",
        ),
    ],
    "completion": [
        Wrong({"prompt": "x", "completion": " "}, "completion is empty"),
        Wrong({"prompt": "", "completion": "y"}, "prompt is empty"),
        Wrong({"prompt": "x", "completion": 3}, "completion must be text, not int"),
        Wrong({"prompt": "x", "completion": "y", "response": "z"}, "--format completion or --format response"),
    ],
    "alpaca": [
        Wrong({"instruction": "x", "input": "y"}, "of which output is missing"),
        Wrong({"instruction": "x", "output": float("nan")}, "output is empty"),
        Wrong({"instruction": "x", "input": 3, "output": "z"}, "input must be text, not int"),
        Wrong({"instruction": "x", "output": "z", "history": [["a"]]}, "history must be a list of [question, answer]"),
        Wrong({"instruction": "x", "output": "z", "text": "x z"}, "--format text or --format alpaca"),
    ],
    "dolly": [Wrong({"instruction": "x", "context": "y"}, "is missing")],
    "query": [Wrong({"query": "x"}, "queries with a response (query), of which response is missing")],
    "question": [Wrong({"question": ["a"], "answer": "y"}, "message 1 has the role None")],
    "response": [Wrong({"prompt": {"a": 1}, "response": "y"}, "prompt must be text or a list of messages, not dict")],
    "input_output": [Wrong({"input": "", "output": "y"}, "input is empty")],
    "preference": [
        Wrong({"prompt": "x", "chosen": "a"}, "of which reject is missing"),
        Wrong({"prompt": "x", "chosen": "a", "rejected": "a"}, "identical"),
        Wrong({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        Wrong({"chosen": "a", "rejected": "b"}, "chosen and rejected answer nothing: a prompt is needed"),
        Wrong({"prompt": "x", "chosen": "a", "rejected": float("nan")}, "reject is missing"),
        Wrong({"prompt": "x", "chosen": 3, "rejected": "b"}, "chosen must be text or a list of messages, not int"),
        Wrong({"prompt": "x", "chosen": "a", "reject": "b", "rejected": "c"}, "reject and rejected say two things"),
        Wrong({"chosen": [user("p"), said("a")], "rejected": [user("q"), said("b")]}, "answer different conversations"),
        Wrong(
            {"prompt": [user("x"), said("y")], "chosen": "a", "rejected": "b"},
            "the prompt ends with the assistant's words",
        ),
        Wrong(
            {"chosen": [user("p")], "rejected": [user("p"), said("b")]},
            "chosen: the last message must be the assistant's",
        ),
    ],
    "transcripts": [
        Wrong(
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "answer different conversations",
        ),
        Wrong({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "reject ends without an answer"),
    ],
    "sharegpt_pairs": [
        Wrong(
            {"conversations": [], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            "the prompt is empty",
        ),
        Wrong(
            {"conversations": [{"from": "human", "value": "x"}], "chosen": {"value": "a"}, "rejected": {"value": "b"}},
            "chosen: message 1 has the role None",
        ),
    ],
    "alpaca_pairs": [Wrong({"instruction": "x", "chosen": "a", "rejected": ""}, "reject is empty")],
    "openai_pairs": [
        Wrong(
            {"input": "x", "preferred_output": [said("a")], "non_preferred_output": [said("b")]},
            'input must be {"messages": [...]}',
        ),
        Wrong(
            {"input": {"messages": [user("x")]}, "preferred_output": [said("a")]},
            "of which non_preferred_output is missing",
        ),
    ],
    "ranked": [
        Wrong({"prompt": "x", "responses": ["a", "b"], "scores": [1]}, "2 answers, but not as many scores"),
        Wrong({"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]}, "no answer is better"),
        Wrong({"prompt": "x", "responses": ["a"], "scores": [1]}, "two answers with scores are needed"),
        Wrong({"prompt": "x", "responses": "a"}, "ranked), but what they hold is of another form"),
    ],
    "rated": [
        Wrong({"prompt": "x", "completion": "y", "label": 2}, "label is 2; it must be true, 1 or good"),
        Wrong({"prompt": "x", "completion": "y", "label": float("nan")}, "label is missing"),
        Wrong({"prompt": "x", "completion": "", "label": 1}, "completion is empty"),
    ],
    "rated_chats": [
        Wrong(chat(HEN[0], label=1), "the last message must be the assistant's"),
        Wrong(chat(*HEN, label="fine"), "label is 'fine'"),
    ],
    "prompt": [
        Wrong({"prompt": 3}, "prompt must be text or a list of messages, not int"),
        Wrong({"colour": "red"}, "no shape of data has these keys; its keys are colour"),
    ],
}
