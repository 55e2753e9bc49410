"""Write a model, or a model with its adapter merged in, for another program.

python export.py --load_model M --to gguf --output M.gguf
python export.py --load_model M --load_adapter P/rwkv-0.pth --to hf --output DIR

The result appears when it is whole; where a program that reads it is installed, that program runs it first, and its
log-probabilities must be this program's.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.checkpoints.adapter_files import hinting, open_adapter
from rwkv_rlhf.checkpoints.exporting import (
    About,
    ExportOptions,
    Vocabulary,
    check_target,
    export_model,
    missing_judge,
    open_exported,
)
from rwkv_rlhf.checkpoints.loading import file_sizes
from rwkv_rlhf.commands.flag_values import ADAPTER_HINTS, adapter_flags, trained_template
from rwkv_rlhf.commands.parsers.export import parser
from rwkv_rlhf.data.tokenizer import HuggingFaceTokenizer, TrieTokenizer, load_tokenizer
from rwkv_rlhf.files import refuse_same_file
from rwkv_rlhf.settings.exports import EXPORTS
from rwkv_rlhf.settings.implementations import load

log = logging.getLogger("export")

NO_VOCABULARY = Vocabulary({}, (), "")


def vocabulary_of(flags: Namespace, vocab_size: int) -> Vocabulary:
    """The words, end of turn and chat template that --vocab_file and --template name. Raises ValueError."""
    template = trained_template(flags)
    tokenizer = load_tokenizer(vocab_size, flags.vocab_file or None)
    end, chat = tuple(tokenizer.encode(template.end)), template.as_jinja()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return Vocabulary({}, end, chat, tokenizer.text)
    assert isinstance(tokenizer, TrieTokenizer)
    return Vocabulary(tokenizer.words, end, chat)


def export_whole(flags: Namespace, output: Path) -> None:
    """Write the model. Raises ValueError."""
    sizes = file_sizes(flags.load_model)
    facts = EXPORTS[flags.to].target
    assert facts is not None
    dtype = flags.dtype or facts.dtypes[0]
    check_target(flags.to, sizes, dtype)
    missing = missing_judge(facts)
    if flags.check and missing:
        raise ValueError(f"--check 1 with --to {flags.to} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    about = About(flags.name or output.stem, Path(flags.load_model).name, flags.licence, flags.source)
    with hinting(ADAPTER_HINTS):
        model = open_exported(
            flags.load_model,
            flags.load_adapter or None,
            vocabulary_of(flags, sizes.vocab_size) if facts.vocabulary else NO_VOCABULARY,
            about,
            flags=adapter_flags(flags),
            initial_file=flags.load_adapter_pissa_init,
            cold=flags.load_cold_adapter,
            force=flags.force,
        )
    wanted = bool(facts.judge) and (not missing if flags.check is None else flags.check)
    sentence = export_model(flags.to, model, output, ExportOptions(dtype, int(flags.shard_size * 2**30), wanted))
    if sentence:
        print(sentence)
    elif missing:
        log.info("not checked: %s is not installed (pip install %s)", ", ".join(missing), " ".join(missing))
    source = Path(flags.load_model).name + (f" with {flags.load_adapter}" if flags.load_adapter else "")
    print(f"exported {source} to {flags.to}: {output}")


def main(words: Sequence[str]) -> None:
    """Exports a model or an adapter. Raises ValueError."""
    flags = parser().parse_args(words)
    output = Path(flags.output)
    for source in filter(None, (flags.load_model, flags.load_adapter)):
        refuse_same_file(source, output, "--output")
    facts = EXPORTS[flags.to]
    if facts.target is not None:
        export_whole(flags, output)
        return
    with hinting(ADAPTER_HINTS):
        file = open_adapter(
            flags.load_adapter, adapter_flags(flags), initial_file=flags.load_adapter_pissa_init, force=flags.force
        )
    print(load(facts.implementation)(file, output, force=flags.force))
