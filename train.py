"""Train an RWKV language model: pre-training, SFT, DPO, ORPO, by layer profile. `--help` lists every flag."""

import json
import sys
from collections.abc import Sequence

from src.cli import INTERRUPTED, parse, run


def main(argv: Sequence[str]) -> int | None:
    """One run: settings, folder, model, then what the flags ask for. Returns the exit status."""
    config = parse(argv)
    if config.doctor:
        from src.training.doctor import doctor

        return doctor()

    from src.training.folder import open_folder
    from src.training.plan_report import dry_run, dry_run_shape
    from src.training.run import evaluate, train
    from src.training.start import start, write_initial

    if config.dry_run_shape:
        return dry_run_shape(config)
    folder = open_folder(config.proj_dir)
    if config.train_stage == 1:
        write_initial(config, folder)
        return None
    ready = start(config, folder)
    if config.eval_only:
        print(json.dumps(evaluate(config, folder, ready)))
        return None
    if config.dry_run:
        return dry_run(config, folder, ready)
    return INTERRUPTED if train(config, folder, ready) else None


if __name__ == "__main__":
    run(main, sys.argv[1:])
