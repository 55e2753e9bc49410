"""Commands one after the other in one process: `every_command.py JSON`, a list of [name, words]; each must succeed."""

import json
import sys

from rwkv_rlhf.commands import run_command


def main(commands):
    """Stops at the first that fails."""
    for name, words in commands:
        try:
            run_command(name, words)
        except SystemExit as done:
            assert not done.code, (name, done.code)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
