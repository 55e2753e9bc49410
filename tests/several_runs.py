"""Training runs one after the other in the same processes, which are started once: `several_runs.py RUNS.json words`.

RUNS.json: a list of lists of words for train.py. The other words say how the processes are started. What a run raises
is written to `error-<rank>.txt` in its folder. In a folder called `forgetful` the optimizer forgets everything after
two micro-batches, and takes up what `rank_state` kept of it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import logging

from src.cli import parse
from src.training import ranks
from src.training.launch import launched
from src.training.module import Trainee
from src.training.resume import HostCopy
from src.training.strategies import load_rank_state, local, own_states, rank_state
from train import ranked


def forget(trainee, batch, index):
    """A training step before which the optimizer's state is wrecked and restored."""
    if index == 2 and trainee.folder.name == "forgetful":
        state = HostCopy()(rank_state(trainee.trainer))
        for _, own in own_states(trainee.trainer):
            assert own
            for value in own.values():
                local(value).fill_(7)
        load_rank_state(trainee.trainer, state)
    return training_step(trainee, batch, index)


def main(runs, words):
    """Every run in the processes of this command."""
    lists = json.loads(Path(runs).read_text())
    with launched(parse([*lists[0], *words]), [__file__, runs, *words]) as placed:
        for one in lists:
            config = parse(one)
            config = dataclasses.replace(config, devices=placed.devices, num_nodes=placed.num_nodes)
            try:
                ranked(config)
            except Exception as error:  # judged by the test
                logging.exception("run failed")
                path = Path(config.proj_dir) / f"error-{ranks.rank()}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{type(error).__name__}: {error}")


training_step = Trainee.training_step

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    Trainee.training_step = forget
    main(sys.argv[1], sys.argv[2:])
