"""--logger: where else a run's figures go, beside metrics.jsonl and Weights & Biases."""

from typing import NamedTuple

from rwkv_rlhf.settings.optional import require


class LoggerFacts(NamedTuple):
    """implementation: its class, a `rwkv_rlhf.reports.logger:Logger`. packages: names of imports that it needs."""

    implementation: str
    packages: tuple[str, ...] = ()


LOGGERS: dict[str, LoggerFacts] = {
    "csv": LoggerFacts("rwkv_rlhf.reports.csv_log:CsvLog"),
    "tensorboard": LoggerFacts("rwkv_rlhf.reports.tensorboard_log:TensorBoardLog", ("tensorboard",)),
}


def loggers(spec: str) -> dict[str, LoggerFacts]:
    """Those that --logger names. Raises ValueError for a name that there is not, or a package that is not installed."""
    names = [word.strip() for word in spec.split(",") if word.strip()]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"{{logger}} {spec}: {name} is none of {', '.join(LOGGERS)}")
        require(f"{{logger}} {name}", *LOGGERS[name].packages)
    return {name: LOGGERS[name] for name in names}
