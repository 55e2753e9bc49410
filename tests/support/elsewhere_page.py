"""docs/coming-from.md out of the table of other programs' spellings: `python -m tests.support.elsewhere_page`."""

from pathlib import Path

from rwkv_rlhf.settings.flags import ALIASES, CONFIG_KEYS, CONFIGS, ELSEWHERE, WORDS
from rwkv_rlhf.settings.help import flag_of
from rwkv_rlhf.settings.pipeline import STAGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
HEAD = """\
# Coming from another trainer

What other programs spell otherwise is put into this program's words, and said in one line at the start; what cannot be
meant is refused with the way to go. `X` stands for any value. This page is made from `flags.py` and `pipeline.py`
in `src/rwkv_rlhf/settings/`. Data of other trainers: `docs/data.md`.

Old scripts are there by their names and arguments: `merge_lora.py ALPHA BASE LORA OUTPUT`, `merge_pissa.py BASE INIT
LORA OUTPUT`, `merge_bone.py`, `merge_disha.py --peft_checkpoint D`, `merge_state.py --state_checkpoint S` (all of
them are `merge.py`), and `make_data.py FILE REPEATS CTX_LEN` (`make_binidx.py`). An adapter to go on from that is not
there is an error, except `rwkv-0`, which the published commands of RWKV-PEFT name whether there is one or not.

| program | typed | here | note |
|---|---|---|---|
"""
JSON = """
Settings as JSON ({flags}) become flags, those of another adapter than `--peft` are left out:

| key | here |
|---|---|
"""
WORD = """
## Other spellings

| typed | here |
|---|---|
"""
PIPELINE = """
## The pipeline of neural_chat

SFT, a reward model, PPO and merging are commands of their own, which take their scripts' words and begin from their
defaults (`docs/reinforcement.md` has the lines). All other flags are those of `train.py` and `merge.py`.

| command | defaults |
|---|---|
{defaults}
| command | typed | here | note |
|---|---|---|---|
"""


def _stages() -> str:
    """The tables of the pipeline: a spelling that all commands share is one row."""
    defaults = [f"| `{name}.py` | `{one.words} {one.adapter}` |\n" for name, one in STAGES.items() if one.words]
    entries = dict.fromkeys(entry for stage in STAGES.values() for entry in stage.spellings)
    rows = []
    for entry in entries:
        names = [name for name, stage in STAGES.items() if entry in stage.spellings]
        whose = "all" if len(names) == len(STAGES) else ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {whose} | `--{entry.said}` | {_here(entry.ours)} | {entry.note} |\n")
    return "".join([PIPELINE.format(defaults="".join(defaults)), *rows])


def _here(ours: str | None) -> str:
    return "refused" if ours is None else f"`--{ours}`" if ours else "no effect"


def text() -> str:
    """What the page must say."""
    rows = [f"| {one.program} | `--{one.said}` | {_here(one.ours)} | {one.note} |\n" for one in ELSEWHERE]
    keys = [f"| `{key}` | {f'`--{flag}`' if flag else 'as `--peft` says'} |\n" for key, flag in CONFIG_KEYS.items()]
    flags = ", ".join(f"`--{flag}`" for flag in CONFIGS)
    words = [f"| `--{alias} X` | `{flag_of(name)} X` |\n" for alias, name in ALIASES.items()]
    words += [
        f"| `--{flag} {word or chr(34) * 2}` | {f'`--{flag} {ours}`' if ours else 'as if absent'} |\n"
        for flag, some in WORDS.items()
        for word, ours in some.items()
    ]
    return "".join([HEAD, *rows, JSON.format(flags=flags), *keys, WORD, *words, _stages()])


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
