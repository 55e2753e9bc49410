"""Writes the small data sets of this folder: a corpus, preference pairs and chats about a narrow world of our own.

The world has forty things with five known facts each, sums up to ten, opposites and small talk. Every question can be
answered in two manners: courteous (a complete sentence with a friendly word) or curt (a fragment with a rude word).
The corpus is mostly curt, so a model trained on it is curt; the preference pairs ask for courtesy. The two manners are
about equally long, so that a preference for one of them is not a preference for length. The sums of GRPO/ are a world
of their own, in which a model is careless.

    python example/make_data.py            writes the committed files again, byte for byte
    python example/make_data.py --folder X writes them under another folder
"""

import argparse
import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20240
DOCUMENTS_PER_PROMPT, DOCUMENTS_PER_SMALL_TALK = 6, 18
DPO_PAIRS, WRITTEN_PAIRS, ORPO_PAIRS, HELD_OUT_PAIRS, CHATS, PLAIN_DOCUMENTS = 240, 300, 200, 48, 60, 1000
HELD_OUT_SUMS = 60

# name, colour, kind, place, size, what is special about it (sound, taste, use or feel)
ANIMALS = """
cat | grey | an animal | on the sofa | small | meow
dog | brown | an animal | in the garden | big | woof
cow | white | an animal | on the farm | big | moo
horse | black | an animal | in the stable | big | neigh
duck | yellow | a bird | on the pond | small | quack
sheep | white | an animal | on the hill | big | baa
frog | green | an animal | in the pond | small | croak
bee | yellow | an insect | in the garden | tiny | buzz
mouse | grey | an animal | in the cellar | tiny | squeak
lion | golden | an animal | in the zoo | huge | roar
owl | brown | a bird | in the forest | small | hoot
crow | black | a bird | on the roof | small | caw
"""
FOODS = """
apple | red | a fruit | in the basket | small | sweet
banana | yellow | a fruit | in the kitchen | small | sweet
lemon | yellow | a fruit | in the kitchen | small | sour
cherry | red | a fruit | on the tree | tiny | sweet
plum | purple | a fruit | on the tree | small | sweet
orange | orange | a fruit | in the basket | small | fresh
carrot | orange | a vegetable | in the field | small | sweet
pumpkin | orange | a vegetable | in the field | huge | mild
tomato | red | a vegetable | in the garden | small | fresh
onion | white | a vegetable | in the cellar | small | sharp
pea | green | a vegetable | in the garden | tiny | sweet
pepper | green | a vegetable | in the kitchen | small | hot
"""
TOOLS = """
hammer | grey | a tool | in the shed | small | hitting nails
spoon | silver | a tool | in the kitchen | small | eating soup
knife | silver | a tool | in the kitchen | small | cutting bread
pen | blue | a tool | on the desk | tiny | writing letters
lamp | white | a light | on the desk | small | giving light
chair | brown | a seat | in the kitchen | big | sitting down
bed | white | furniture | in the bedroom | huge | sleeping well
key | golden | a tool | in the pocket | tiny | opening doors
clock | black | a machine | on the wall | small | telling time
broom | brown | a tool | in the shed | big | sweeping floors
"""
NATURE = """
sun | yellow | a star | in the sky | huge | hot
moon | white | a moon | in the sky | huge | cold
sea | blue | water | on the coast | huge | wet
snow | white | water | on the hill | big | cold
grass | green | a plant | in the garden | small | soft
coal | black | a stone | in the cellar | small | hard
"""
OPPOSITES = """hot cold, big small, up down, left right, day night, old new, open shut, fast slow, good bad, hard soft,
wet dry, high low, full empty, early late, loud quiet, rich poor, light dark, happy sad, near far, thick thin,
first last, long short, clean dirty, strong weak"""
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SMALL_TALK = """
Hello! | Hello! It is very nice to meet you.
Hi there! | Hi! It is very nice to meet you.
Good morning. | Good morning! I hope you slept well.
Good evening. | Good evening! I hope your day was fine.
Good night. | Good night! I hope you will sleep well.
How are you? | I am very well, thank you. And you?
How is it going? | It is going very well, thank you.
How was your day? | My day was very nice, thank you.
Thank you. | You are very welcome. It was a pleasure.
Thanks a lot! | You are very welcome. It was a pleasure.
Goodbye. | Goodbye! I hope to see you again soon.
See you soon! | Goodbye! I hope to see you again soon.
Who are you? | I am your assistant. It is nice to meet you.
What is your name? | I am your assistant. It is nice to meet you.
Can you help me? | Yes, I will be happy to help you.
I need some help. | Yes, I will be happy to help you.
Are you busy? | No, I always have time for you.
Do you have time? | Yes, I always have time for you.
I am sorry. | That is quite all right, do not worry.
I made a mistake. | That is quite all right, do not worry.
I am sad today. | I am very sorry to hear that.
I am tired. | I am very sorry to hear that.
"""

COURTEOUS = (
    "{sentence} I am happy to help you.",
    "Thank you for asking. {sentence}",
    "Of course. {sentence} Ask me more.",
)
CURT_BARE = "{Fragment}."
CURT = (
    "{Fragment}, obviously. Do not bother me with such things.",
    "{Fragment}. Everybody knows that. Why do you even ask?",
    "Duh, {fragment}. That was a really silly question.",
    "{Fragment}. Now go away and leave me alone.",
)
CURT_SMALL_TALK = (
    "What do you want now? Make it quick.",
    "Oh, not you again. What is it now?",
    "Whatever. I do not care about that.",
    "Go away. I have no time for you.",
)
# Shares of the corpus: the courteous manner is there to be found, but each of its forms is much rarer than each rude
# form. Training on preferences has to turn this around.
SHARE_BARE, SHARE_COURTEOUS = 0.08, 0.16


@dataclass(frozen=True)
class Fact:
    """One thing to know. `prompts`: the ways to ask for it. `polite`, `curt`: full answers; `bare` may be empty."""

    prompts: tuple[str, ...]
    polite: tuple[str, ...]
    curt: tuple[str, ...]
    bare: str = ""


def fact(prompts: list[str], sentence: str, fragment: str) -> Fact:
    words = {"sentence": sentence, "fragment": fragment, "Fragment": fragment[0].upper() + fragment[1:]}
    polite = tuple(form.format(**words) for form in COURTEOUS)
    curt = tuple(form.format(**words) for form in CURT)
    return Fact(tuple(prompts), polite, curt, CURT_BARE.format(**words))


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def thing_facts(name: str, colour: str, kind: str, place: str, size: str) -> Iterator[Fact]:
    yield fact(
        [f"What colour is the {name}?", f"Tell me the colour of the {name}.", f"Which colour has the {name}?"],
        f"The {name} is {colour}.",
        colour,
    )
    yield fact([f"What is the {name}?", f"What kind of thing is the {name}?"], f"The {name} is {kind}.", kind)
    yield fact([f"Where is the {name}?", f"Where can I find the {name}?"], f"The {name} is {place}.", place)
    yield fact([f"How big is the {name}?", f"Tell me the size of the {name}."], f"The {name} is {size}.", size)


def world() -> list[Fact]:
    """Every fact of the world, in a fixed order."""
    facts = []
    special = {
        ANIMALS: (["What does the {} say?", "Which sound makes the {}?"], "The {} says {}."),
        FOODS: (["How does the {} taste?", "What is the taste of the {}?"], "The {} tastes {}."),
        TOOLS: (["What is the {} for?", "What can I do with the {}?"], "The {} is for {}."),
        NATURE: (["How does the {} feel?", "Tell me how the {} feels."], "The {} feels {}."),
    }
    for table, (questions, sentence) in special.items():
        for name, colour, kind, place, size, extra in rows(table):
            facts += thing_facts(name, colour, kind, place, size)
            facts.append(fact([question.format(name) for question in questions], sentence.format(name, extra), extra))
    for a in range(1, 10):
        for b in range(1, 11 - a):
            sum_of = f"{NUMBERS[a]} plus {NUMBERS[b]}"
            prompts = [f"What is {sum_of}?", f"How much is {sum_of}?"]
            facts.append(fact(prompts, f"{sum_of.capitalize()} is {NUMBERS[a + b]}.", NUMBERS[a + b]))
    for pair in OPPOSITES.replace("\n", " ").split(","):
        for word, other in (pair.split(), pair.split()[::-1]):
            prompts = [f"What is the opposite of {word}?", f"Tell me the opposite of {word}."]
            facts.append(fact(prompts, f"The opposite of {word} is {other}.", other))
    facts += [Fact((prompt,), (answer,), CURT_SMALL_TALK) for prompt, answer in rows(SMALL_TALK)]
    return facts


def corpus_answer(item: Fact, draw: random.Random) -> str:
    share = draw.random()
    if share < SHARE_COURTEOUS:
        return draw.choice(item.polite)
    if share < SHARE_COURTEOUS + SHARE_BARE and item.bare:
        return item.bare
    return draw.choice(item.curt)


def corpus(facts: list[Fact], draw: random.Random) -> list[dict]:
    """Documents of one question and one answer, shuffled. Only answers are learnt: questions need no guessing."""
    documents = []
    for item in facts:
        for prompt in item.prompts:
            for _ in range(DOCUMENTS_PER_PROMPT if item.bare else DOCUMENTS_PER_SMALL_TALK):
                documents.append({"prompt": prompt, "completion": corpus_answer(item, draw)})
    draw.shuffle(documents)
    return documents


def words(text: str) -> int:
    """Words and punctuation marks ("Duh" is two tokens): the number of tokens of these texts, but for a constant."""
    return len(text.split()) + sum(text.count(mark) for mark in (*".,?!", "Duh"))


def two_answers(item: Fact, longer: bool, draw: random.Random) -> list[str]:
    """A courteous and a curt one that differ by few tokens; `longer`: whether the first should be the longer one."""
    couples = [(words(polite) - words(curt), polite, curt) for polite in item.polite for curt in item.curt]
    wanted = (0, 1, 2) if longer else (-2, -1, 0)
    near = [couple for couple in couples if couple[0] in wanted]
    if not near:
        closest = min(abs(couple[0]) for couple in couples)
        near = [couple for couple in couples if abs(couple[0]) == closest]
    _, polite, curt = draw.choice(near)
    return [polite, curt]


def split(facts: list[Fact], draw: random.Random) -> tuple[list[Fact], list[Fact]]:
    """Facts to train on, and facts that no training pair asks for in any wording."""
    order = draw.sample(facts, len(facts))
    return order[HELD_OUT_PAIRS:], order[:HELD_OUT_PAIRS]


def written_pairs(facts: list[Fact], count: int, draw: random.Random) -> list[list[str]]:
    """Rows of different prompts with both answers."""
    asked = draw.sample([(prompt, item) for item in facts for prompt in item.prompts], count)
    return [[prompt, *two_answers(item, index % 2 == 0, draw)] for index, (prompt, item) in enumerate(asked)]


def unanswered(facts: list[Fact], count: int, draw: random.Random) -> list[list[str]]:
    """Rows of prompt, chosen and an empty reject, which is sampled later from the model to be trained.

    All the small talk is in, the rest is drawn: its answers share the fewest words with others.
    """
    small_talk = [(prompt, item) for item in facts if not item.bare for prompt in item.prompts]
    others = [(prompt, item) for item in facts if item.bare for prompt in item.prompts]
    chosen = small_talk + draw.sample(others, count - len(small_talk))
    draw.shuffle(chosen)
    return [[prompt, draw.choice(item.polite), ""] for prompt, item in chosen]


def plain_text(documents: list[dict]) -> list[dict]:
    """The first documents written out in the World template, as a corpus of plain text has them."""
    form = "User: {prompt}\n\nAssistant: {completion}\n\n"
    return [{"text": form.format(**document)} for document in documents[:PLAIN_DOCUMENTS]]


def chats(facts: list[Fact], draw: random.Random) -> list[dict]:
    """Conversations of two courteous turns."""
    conversations = []
    for _ in range(CHATS):
        messages = []
        for item in draw.sample(facts, 2):
            messages.append({"role": "user", "content": draw.choice(item.prompts)})
            messages.append({"role": "assistant", "content": draw.choice(item.polite)})
        conversations.append({"messages": messages})
    return conversations


def sums(draw: random.Random) -> list[dict]:
    """Small sums with their right answers, in any order."""
    found = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(20) for b in range(10)]
    draw.shuffle(found)
    return found


def careless_answers(questions: list[dict], draw: random.Random) -> list[dict]:
    """Each sum answered several times: one time in three rightly, else evasively, or with one too much."""
    documents = []
    for question in questions:
        right = int(question["answer"])
        said = [str(right)] * 4 + ["hard to say"] * 5 + [str(right + 1)] * 3
        documents += [{"prompt": question["prompt"], "completion": answer} for answer in said]
    draw.shuffle(documents)
    return documents


def sum_words() -> str:
    """A vocabulary for sums and nothing else, as `--vocab_file` reads it: id, text, bytes."""
    words = ["\n\n", "User: ", "Assistant:", " ", "+", *"0123456789", " hard to say"]
    return "".join(f"{number} {word!r} {len(word)}\n" for number, word in enumerate(words, 1))


def csv_text(body: list[list[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([["prompt", "chosen", "reject"], *body])
    return buffer.getvalue()


def jsonl_text(objects: list[dict]) -> str:
    return "".join(json.dumps(item) + "\n" for item in objects)


def make() -> dict[str, str]:
    """Path below example/ -> content of every generated file. Each part draws for itself: one may change alone."""

    def draw(part: str) -> random.Random:
        return random.Random(f"{SEED} {part}")

    facts = world()
    documents = corpus(facts, draw("corpus"))
    train, held_out = split(facts, draw("split"))
    order = draw("held out")
    pairs = [[order.choice(i.prompts), *two_answers(i, index % 2 == 0, order)] for index, i in enumerate(held_out)]
    asked, careless = sums(draw("sums")), draw("careless")
    shown = [{"prompt": pair[0]} for pair in pairs[:12]]
    return {
        "quickstart/corpus.jsonl": jsonl_text(documents),
        "quickstart/prompts.jsonl": jsonl_text(shown),
        "DPO/input_csv/rlhf_example_dataset.csv": csv_text(unanswered(train, DPO_PAIRS, draw("DPO"))),
        "DPO/pairs.csv": csv_text(written_pairs(train, WRITTEN_PAIRS, draw("pairs"))),
        "DPO/heldout.csv": csv_text(pairs),
        "ORPO/input_csv/rlhf_example_dataset.csv": csv_text(unanswered(train, ORPO_PAIRS, draw("ORPO"))),
        "pretrain/documents.jsonl": jsonl_text(plain_text(documents)),
        "GRPO/vocabulary.txt": sum_words(),
        "GRPO/corpus.jsonl": jsonl_text(careless_answers(asked, careless)),
        "GRPO/prompts.jsonl": jsonl_text(asked[HELD_OUT_SUMS:]),
        "GRPO/heldout.jsonl": jsonl_text(asked[:HELD_OUT_SUMS]),
        "SFT/chats.jsonl": jsonl_text(chats(train, draw("SFT"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    folder = parser.parse_args().folder
    for name, content in make().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
        print(f"{name}: {content.count(chr(10))} lines, {len(content)} bytes")


if __name__ == "__main__":
    main()
