"""Train an RWKV language model: pre-training, SFT, DPO, ORPO, by layer profile. `--help` lists every flag."""

import json
import sys
from collections.abc import Sequence

from src.cli import INTERRUPTED, parse, run
from src.config import Config


def main(argv: Sequence[str]) -> int | None:
    """One run: settings, folder, model, then what the flags ask for. Returns the exit status."""
    config = parse(argv)
    if config.doctor:
        from src.training.doctor import doctor

        return doctor()

    from src.training.launch import launched

    with launched(config, [__file__, *argv]) as config:
        return None if config is None else ranked(config)


def ranked(config: Config) -> int | None:
    """The run in one process, which is one of several where --devices, --num_nodes or a launcher says so."""
    from src.training.folder import open_folder
    from src.training.out_of_memory import explained
    from src.training.plan_report import dry_run, dry_run_shape
    from src.training.resume import find_point
    from src.training.run import evaluate, train
    from src.training.start import start, write_initial

    if config.dry_run_shape:
        return dry_run_shape(config)
    folder = open_folder(config.proj_dir)
    if config.train_stage == 1:
        write_initial(config, folder)
        return None
    with explained(config):
        point = None if config.eval_only else find_point(config, folder)
        ready = start(config, folder, point)
        if config.eval_only:
            print(json.dumps(evaluate(config, folder, ready)))
            return None
        if config.dry_run:
            return dry_run(config, folder, ready)
        return INTERRUPTED if train(config, folder, ready, point) else None


if __name__ == "__main__":
    run(main, sys.argv[1:])
