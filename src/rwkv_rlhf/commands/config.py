"""Settings of a run without the run: checked and printed as a file for --config, or as the schema of such files.

rwkv-rlhf config --config run.yaml --lr_init 1e-5 > other.yaml
rwkv-rlhf config --schema > run.schema.json
"""

import json
import sys
from collections.abc import Sequence

from rwkv_rlhf.settings.command_line import Parser, kinds, parse, train_parser
from rwkv_rlhf.settings.config_file import config_text, schema


def parser() -> Parser:
    """The flags of train.py and one more."""
    flags = train_parser()
    flags.add_switch("--schema", help="print the JSON schema of files for --config instead")
    return flags


def main(words: Sequence[str]) -> int | None:
    """Prints the settings that `words` mean, or the schema."""
    known, _ = parser().parse_known_args(words)  # what is unknown is for `parse`, which reads other programs' flags too
    if known.schema:
        sys.stdout.write(json.dumps(schema(kinds()), indent=2) + "\n")
    else:
        sys.stdout.write(config_text(parse(words)))
    return None
