"""Train an RWKV language model: pre-training, SFT, DPO, ORPO, by layer profile. `--help` lists every flag."""

import json
from collections.abc import Sequence

from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.exit_status import INTERRUPTED


def main(argv: Sequence[str]) -> int | None:
    """One run: settings, folder, model, then what the flags ask for. Returns the exit status."""
    config = parse(argv)
    if config.doctor:
        from rwkv_rlhf.commands.doctor import doctor

        return doctor()

    from rwkv_rlhf.commands.several import SELF
    from rwkv_rlhf.distributed.launch import launched

    with launched(config, [SELF, "train", *argv]) as here:
        return None if here is None else ranked(here)


def ranked(config: Config) -> int | None:
    """The run in one process, which is one of several where --devices, --num_nodes or a launcher says so."""
    from rwkv_rlhf.checkpoints.run_folder import open_folder
    from rwkv_rlhf.training.dry_run import dry_run, dry_run_shape
    from rwkv_rlhf.training.out_of_memory import explained
    from rwkv_rlhf.training.resume import find_point
    from rwkv_rlhf.training.run import evaluate, train
    from rwkv_rlhf.training.start import start, with_named_model, write_initial

    if config.dry_run_shape:
        dry_run_shape(config)
        return None
    folder = open_folder(config.proj_dir)
    if config.train_stage == 1:
        write_initial(config, folder)
        return None
    with explained(config):
        config = with_named_model(config)
        point = None if config.eval_only else find_point(config, folder)
        ready = start(config, folder, point)
        if config.eval_only:
            print(json.dumps(evaluate(config, folder, ready)))
            return None
        if config.dry_run:
            dry_run(config, folder, ready)
            return None
        return INTERRUPTED if train(config, folder, ready, point) else None
