"""Training runs one after the other in the same processes, which are started once: `several_runs.py RUNS.json words`.

RUNS.json: a list of lists of words for train.py. The other words say how the processes are started. What a run raises
is written to `error-<rank>.txt` in its folder. In a folder called `forgetful` the optimizer forgets everything after
two micro-batches, and takes up what `rank_state` kept of it. Blocks are compiled by aot_eager, which makes no code.
"""

import dataclasses
import functools
import json
import logging
import sys
from pathlib import Path

from rwkv_rlhf.commands.train import ranked
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.launch import launched
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.reports import curves
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training import fixed_prompts
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.resume import HostCopy
from rwkv_rlhf.training.strategies import load_rank_state, local, own_states, rank_state


def forget(module, batch, index):
    """A training step before which the optimizer's state is wrecked and restored."""
    if index == 2 and module.folder.name == "forgetful":
        state = HostCopy()(rank_state(module.trainer))
        for _, own in own_states(module.trainer):
            assert own
            for value in own.values():
                local(value).fill_(7)
        load_rank_state(module.trainer, state)
    return training_step(module, batch, index)


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


training_step = TrainingModule.training_step

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    TrainingModule.training_step = forget
    RWKV.compile_blocks = functools.partialmethod(RWKV.compile_blocks, "aot_eager")
    curves.draw_curves = lambda folder: None  # takes longer than the training, as long answers do
    fixed_prompts.MOST_TOKENS = 4
    main(sys.argv[1], sys.argv[2:])
