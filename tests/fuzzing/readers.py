"""Every reader of the program: a whole sample, the function that reads it in earnest, and what may happen to the file.

READERS is the table; a new format is one line in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from rwkv_rlhf.checkpoints.exporters.peft import from_peft_folder
from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.resume_points import last_point
from rwkv_rlhf.checkpoints.tensor_tree import read_tree
from rwkv_rlhf.data.batch import pack, pack_rated
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.opening import is_rated, kind_of, open_h5, open_pairs, open_rated, open_slices, open_text
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.stable import stable_form
from rwkv_rlhf.data.templates.jinja import load_chat_template
from rwkv_rlhf.data.text.teacher_log import TeacherLog
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.generation.rejects import read_tasks
from rwkv_rlhf.plan import COLUMNS, OLD_COLUMNS, read_profile
from rwkv_rlhf.rl.rewards import open_rewards
from rwkv_rlhf.rl.rollout import Asked, Sample
from rwkv_rlhf.scoring.kept_scores import KeptScores
from rwkv_rlhf.scoring.reference import cached_scores
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.shapes import KINDS
from tests.fuzzing import containers as c
from tests.fuzzing import mutators as m
from tests.fuzzing.round_trips import WRITERS
from tests.fuzzing.samples import (
    ROWS,
    VOCAB,
    Words,
    pair_objects,
    rated_objects,
    turns,
    write_adapter,
    write_binidx,
    write_cache,
    write_checkpoint,
    write_csv,
    write_documents,
    write_hf_folder,
    write_journal,
    write_json_lines,
    write_pair_h5,
    write_pair_save,
    write_parquet,
    write_peft,
    write_point,
    write_profile,
    write_rejects,
    write_reward_file,
    write_run_file,
    write_scores,
    write_shapes,
    write_template,
    write_tokenizer,
    write_vocabulary,
)
from tests.fuzzing.words import TYPED, VARIABLES


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        write: makes a whole sample in a folder and returns the path that is read. read: what the program does with it.
        mutators: beside those of bytes. repairs: the reader may shorten the file or begin it anew, nothing else may.
        made: nothing is damaged, the function makes up its own input in the file's folder. says: what a sentence may
        name in place of the file.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path, Random], Any]
    mutators: tuple[m.Mutator, ...] = ()
    repairs: bool = False
    made: bool = False
    says: tuple[str, ...] = ()


def read_pairs(path: Path, rng: Random) -> Any:
    """As train.py does: what kind of file is it, which examples, the first batch."""
    kind_of(path)
    how = {
        "skip_bad": rng.random() < 0.5,
        "max_len": rng.choice((0, 2, 64)),
        "template": rng.choice(("world", "plain")),
    }
    if is_rated(path):
        return pack_rated(list(open_rated(path, Words(), **how))[:2])
    return pack(list(open_pairs(path, Words(), ctx_len=16, drop_ties=rng.random() < 0.5, **how))[:2])


def read_text(path: Path, rng: Random) -> Any:
    kind_of(path)
    template = rng.choice(("world", "g1", "plain", "mixed"))
    texts = open_text(path, Words(), ctx_len=rng.choice((0, 5)), template=template, skip_bad=rng.random() < 0.5)
    return pack([texts[index] for index in range(min(3, len(texts)))])


def read_teacher(path: Path, rng: Random) -> Any:
    kind_of(path)
    texts = open_h5(path, VOCAB, ctx_len=rng.choice((0, 5)), teacher=True, skip_bad=rng.random() < 0.5)
    return pack([texts[index] for index in range(min(3, len(texts)))])


def read_binidx(path: Path, rng: Random) -> Any:
    if rng.random() < 0.5:
        return read_text(path, rng)
    slices, _ = open_slices(path, VOCAB, 8, 1)
    return pack([slices[0], slices[len(slices) - 1]])


def read_tasks_of(path: Path, rng: Random) -> Any:
    return read_tasks(path, "world", DataReport(str(path), skip_bad=rng.random() < 0.5))


def read_plan(path: Path, rng: Random) -> Any:
    return read_profile(str(path), 2, lr_init=1e-4, lr_final=1e-5, weight_decay=0.0)


def read_checkpoint(path: Path, rng: Random) -> Any:
    return load_model(path, BuildOptions(torch.float32))


def read_adapter(path: Path, rng: Random) -> Any:
    return load_combined(path.parent / "base.pth", path, BuildOptions(torch.float32))


def read_peft(path: Path, rng: Random) -> Any:
    return from_peft_folder(path, path.parent / "base.pth", path.parent / "written" / "out.pth", "none")


def read_vocabulary(path: Path, rng: Random) -> Any:
    tokenizer = load_tokenizer.__wrapped__(65536, str(path))
    for text in ("abc", "", "\u732b\ud800\0", "ab" * 50):
        ids = tokenizer.encode(text)
        assert all(0 <= number < 65536 for number in ids)
        tokenizer.decode(ids), tokenizer.decode_bytes(ids)


def read_template(path: Path, rng: Random) -> Any:
    form = load_chat_template.__wrapped__(str(path))
    said = [Turn("user", "one"), Turn("assistant", "first"), Turn("user", "two")]
    try:
        return form.render(said, ["yes", "no"]), list(form.spans([*said, Turn("assistant", "yes")]))
    except ValueError as error:  # the caller adds the place of the row
        raise ValueError(f"{path}:1: {error}") from error


def read_journal(path: Path, rng: Random) -> Any:
    return [pack(batch) for batch in islice(TeacherLog(path, {"teacher": "x"}, 2), 4)]


def read_rejects(path: Path, rng: Random) -> Any:
    cells = [dict(zip(("prompt", "chosen", "reject"), row)) for row in ROWS]
    return RejectFile(path, ["prompt", "chosen", "reject"], {"model": "x"}).resume(cells, rng.random() < 0.3)


def read_scores(path: Path, rng: Random) -> Any:
    return KeptScores(path, "key").finished([1, 2, 1])


def read_cache(path: Path, rng: Random) -> Any:
    return cached_scores(path, 2)


def read_point(path: Path, rng: Random) -> Any:
    """As a run does; or without its hashes, which whoever means harm can compute too."""
    if rng.random() < 0.5:
        return read_tree(path / "rank-0.safetensors")
    point = last_point(path.parent)
    return point and point.read(0)


def read_shapes(path: Path, rng: Random) -> Any:
    """As convert_data.py does, of any shape."""
    report = DataReport(str(path), skip_bad=rng.random() < 0.5)
    reading = Reading(drop_thinking=rng.random() < 0.5)
    return [stable_form(found.item) for found in read_items(path, report, tuple(KINDS), reading)]


def read_reward_file(path: Path, rng: Random) -> Any:
    """The user's own functions, asked about two answers."""
    rewards = open_rewards(Config(loss="grpo", reward_funcs=f"{path}:exact,short"), {})
    example = PromptExample([1, 2], "say", {"answer": "x"}, "say", "", True, "prompts.jsonl:1")
    return rewards([Sample(Asked(n, example), n, [3, 4], "x" * n, torch.zeros(2), 0.0, True) for n in (0, 1)])


def read_run_file(path: Path, rng: Random) -> Any:
    return parse(["--config", str(path)])


def made(make: Callable[[Path, Random], Any], says: tuple[str, ...] = ()) -> Reader:
    """What makes up its own input."""

    def write(folder: Path) -> Path:
        (folder / "nothing.txt").write_text("")
        return folder / "nothing.txt"

    return Reader(write, lambda path, rng: make(path.parent, rng), repairs=True, made=True, says=says)


FLAGS = ("--",)
READERS: dict[str, Reader] = {
    "pairs.csv": Reader(
        lambda d: write_csv(d / "pairs.csv", [("prompt", "chosen", "reject"), *ROWS]), read_pairs, m.CSV
    ),
    "pairs.jsonl": Reader(lambda d: write_json_lines(d / "pairs.jsonl", pair_objects()), read_pairs, m.JSON),
    "pairs.parquet": Reader(lambda d: write_parquet(d / "pairs.parquet", pair_objects()[:4]), read_pairs, c.PARQUET),
    "pairs.save": Reader(write_pair_save, read_pairs, c.TORCH),
    "pairs.h5": Reader(write_pair_h5, read_pairs, c.H5),
    "rated.csv": Reader(
        lambda d: write_csv(d / "rated.csv", [rated_objects()[0], *map(dict.values, rated_objects())]),
        read_pairs,
        m.CSV,
    ),
    "rated.jsonl": Reader(lambda d: write_json_lines(d / "rated.jsonl", rated_objects()), read_pairs, m.JSON),
    "rated.parquet": Reader(lambda d: write_parquet(d / "rated.parquet", rated_objects()), read_pairs, c.PARQUET),
    "text.jsonl": Reader(
        lambda d: write_json_lines(d / "text.jsonl", [{"text": "abc " * n} for n in range(1, 5)]), read_text, m.JSON
    ),
    "chat.jsonl": Reader(
        lambda d: write_json_lines(d / "chat.jsonl", [{"messages": turns("yes")}, {"prompt": "a", "completion": "b"}]),
        read_text,
        m.JSON,
    ),
    "text.txt": Reader(lambda d: write_json_lines(d / "text.txt", [{"plain": "text"}]), read_text, m.TEXT),
    "text.h5": Reader(lambda d: write_documents(d, 0), read_text, c.H5),
    "teacher.h5": Reader(lambda d: write_documents(d, 3), read_teacher, c.H5),
    "binidx": Reader(write_binidx, read_binidx),
    "prompts.csv": Reader(
        lambda d: write_csv(d / "in.csv", [("prompt", "chosen", "reject"), *ROWS]), read_tasks_of, m.CSV
    ),
    "profile.csv": Reader(lambda d: write_profile(d, COLUMNS), read_plan, m.CSV),
    "old profile.csv": Reader(lambda d: write_profile(d, OLD_COLUMNS), read_plan, m.CSV),
    "model.pth": Reader(lambda d: write_checkpoint(d, "model.pth"), read_checkpoint, c.TORCH),
    "model.safetensors.index.json": Reader(
        lambda d: write_checkpoint(d, "model.safetensors.index.json"), read_checkpoint, c.SAFETENSORS + m.JSON
    ),
    "folder of Hugging Face": Reader(write_hf_folder, read_checkpoint, c.SAFETENSORS),
    "model.safetensors": Reader(lambda d: write_checkpoint(d, "model.safetensors"), read_checkpoint, c.SAFETENSORS),
    "adapter and sidecar": Reader(write_adapter, read_adapter, c.TORCH + m.JSON),
    "PEFT folder": Reader(write_peft, read_peft, c.SAFETENSORS + m.JSON),
    "vocab.txt": Reader(write_vocabulary, read_vocabulary, m.TEXT),
    "tokenizer.json": Reader(write_tokenizer, read_vocabulary, m.JSON),
    "chat.jinja": Reader(lambda d: write_template(d, False), read_template, m.JINJA),
    "tokenizer_config.json": Reader(lambda d: write_template(d, True), read_template, m.JINJA + m.JSON),
    "resume point": Reader(write_point, read_point, c.SAFETENSORS + m.JSON),
    "reference cache": Reader(write_cache, read_cache, c.TORCH),
    "teacher's journal": Reader(write_journal, read_journal, repairs=True),
    "rejects.csv": Reader(lambda d: write_rejects(d, ".csv"), read_rejects, m.CSV, repairs=True),
    "rejects.jsonl": Reader(lambda d: write_rejects(d, ".jsonl"), read_rejects, m.JSON, repairs=True),
    "kept scores": Reader(write_scores, read_scores, m.JSON, repairs=True),
    "shapes.jsonl": Reader(lambda d: write_shapes(d, ".jsonl"), read_shapes, m.JSON),
    "shapes.json": Reader(lambda d: write_shapes(d, ".json"), read_shapes, m.JSON),
    "shapes.csv": Reader(lambda d: write_shapes(d, ".csv"), read_shapes, m.CSV),
    "shapes.tsv": Reader(lambda d: write_shapes(d, ".tsv"), read_shapes, m.TEXT),
    "shapes.parquet": Reader(lambda d: write_shapes(d, ".parquet"), read_shapes, c.PARQUET),
    "shapes.jsonl.gz": Reader(lambda d: write_shapes(d, ".jsonl.gz"), read_shapes, c.GZIP),
    "shapes.jsonl.zst": Reader(lambda d: write_shapes(d, ".jsonl.zst"), read_shapes, c.ZSTD),
    "rewards.py": Reader(write_reward_file, read_reward_file, m.TEXT, says=("reward_funcs",)),
    "run.yaml": Reader(write_run_file, read_run_file, m.YAML, says=FLAGS),
    **{f"round trip of {name}": made(one, ("written", "in.jsonl", "in.parquet")) for name, one in WRITERS.items()},
    **{name: made(one, (*FLAGS, "{", *VARIABLES, "SLURM")) for name, one in TYPED.items()},
}
