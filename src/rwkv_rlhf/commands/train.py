"""Train an RWKV language model: pre-training, SFT, DPO, ORPO, by layer profile. `--help` lists every flag."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.exit_status import INTERRUPTED
from rwkv_rlhf.settings.given_files import check_given_files, with_adapter_there
from rwkv_rlhf.settings.hub import local_words, with_local_files
from rwkv_rlhf.settings.surroundings import loading, one_of_several

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int | None:
    """One run: settings, folder, model, then what the flags ask for. Returns the exit status."""
    config = with_adapter_there(parse(argv))
    said = not one_of_several()  # else rank zero says what is wrong, for all of them
    if said:
        check_given(config)  # before anything is fetched
    fetched = with_local_files(config)
    if said and fetched is not config:
        check_given(fetched)
    config = fetched
    if said and "torch" not in sys.modules:
        log.info("PyTorch is being loaded")  # some seconds
    if config.doctor:
        with loading("torch"):
            from rwkv_rlhf.commands.doctor import doctor

        return doctor()

    with loading("torch"):
        from rwkv_rlhf.commands.several import SELF
        from rwkv_rlhf.distributed.launch import launched

    with launched(config, [SELF, "train", *local_words(argv)]) as here:
        return None if here is None else ranked(here, checked=said)


def check_given(config: Config) -> None:
    """Raises ValueError for files that are not there or not what they should be, before anything slow begins."""
    check_given_files(config)
    if "template" in config.given:
        from rwkv_rlhf.data.templates.named import check_template

        check_template(config.template)


def serve_page(config: Config, folder: Path, held: ExitStack) -> None:
    """--serve_report, on rank zero, from before the model is loaded until the process leaves `held`."""
    from rwkv_rlhf.distributed import ranks

    if config.serve_report and ranks.is_rank_zero():
        from rwkv_rlhf.reports.server import PageServer

        held.enter_context(PageServer(folder, config.serve_report))


def ranked(config: Config, checked: bool = False) -> int | None:
    """The run in one process, which is one of several where --devices, --num_nodes or a launcher says so. checked:
    `check_given` was called."""
    from rwkv_rlhf.checkpoints.resume_points import ResumePoint
    from rwkv_rlhf.checkpoints.run_folder import open_folder
    from rwkv_rlhf.checkpoints.run_lock import run_lock
    from rwkv_rlhf.distributed import ranks
    from rwkv_rlhf.distributed.launch import rank_info
    from rwkv_rlhf.reports.wandb_run import open_wandb
    from rwkv_rlhf.training.adapter_choice import with_adapter
    from rwkv_rlhf.training.choices import settings_of, with_length, with_precision
    from rwkv_rlhf.training.dry_run import dry_run, dry_run_shape
    from rwkv_rlhf.training.find_point import find_point
    from rwkv_rlhf.training.out_of_memory import explained
    from rwkv_rlhf.training.run_identity import common_identity
    from rwkv_rlhf.training.run_owner import goes_on, refuse_another_runs_folder, refuse_another_start
    from rwkv_rlhf.training.start import start, with_named_model, write_initial

    ranks.agreed(lambda: None if checked else check_given(config))
    config = with_length(with_precision(config))
    if config.dry_run_shape:
        dry_run_shape(config)
        return None
    config = ranks.agreed(lambda: with_adapter(config))
    folder = open_folder(config.proj_dir)
    if config.train_stage == 1:
        with run_lock(folder):
            refuse_another_start(config, folder)
            write_initial(config, folder)
        return None
    with explained(config), ExitStack() as held:
        config = with_named_model(config)
        if config.eval_only:
            from rwkv_rlhf.training.evaluate import evaluate, evaluation_lines

            result = evaluate(config, folder, start(config, folder))
            if ranks.is_rank_zero():
                print(
                    json.dumps(result, allow_nan=False) if config.json else "\n".join(evaluation_lines(config, result))
                )
            return None
        if not config.dry_run:
            ranks.agreed(lambda: held.enter_context(run_lock(folder)))
            ranks.agreed(lambda: serve_page(config, folder, held))
        settings = common_identity(config, rank_info().local_rank)

        def claimed() -> ResumePoint | None:
            point = find_point(config, folder, settings)
            if not goes_on(config, folder, point):
                refuse_another_runs_folder(config, folder, settings)
            if config.wandb and not config.dry_run:
                open_wandb(config.wandb, folder, settings_of(config))
            return point

        point = ranks.agreed(claimed)
        ready = start(config, folder, point)
        if config.dry_run:
            dry_run(config, folder, ready)
            return None
        with loading("pytorch_lightning"):  # which a dry run does without
            from rwkv_rlhf.training.run import train

        return INTERRUPTED if train(config, folder, ready, settings, point) else None
