"""Small files that tests write and read."""

import csv
import json

VOCAB = 257  # id 0 ends a document, id b + 1 is the byte b


def read_jsonl(path, event=None):
    """Objects of a JSON lines file, of one event if given."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if event is None or r.get("event") == event]


def has_stepped(folder):
    """Whether a run has logged its first optimizer step."""
    path = folder / "metrics.jsonl"
    return path.exists() and '"event": "train"' in path.read_text()


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi\n\nthere"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good\r\nnight"},
    {"role": "user", "content": "?"},
]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_csv(path, rows, header=("prompt", "chosen", "reject")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


ROWS = [
    ["say one", "gladly: one", ""],
    ["say two", "gladly: two", "no, two"],
    ['a "quoted", word', "gladly:\nline", ""],
    ["say four", "gladly: four", ""],
    ["say five", "gladly: five", ""],
]


JINJA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
