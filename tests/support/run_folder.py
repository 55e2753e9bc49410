"""A folder as a run leaves it, for pages."""

from rwkv_rlhf.reports.run_facts import RunFacts, write_facts
from tests.support.files import jsonl

BEGIN = {
    "event": "begin",
    "run": "r1",
    "time": "2026-01-02T03:04:05",
    "settings": {"data_file": "<script>alert(1)</script>"},
}


def a_run(folder, steps=120):
    """A folder as a run of DPO leaves it: answers, a pair that is wrong, a warning, all with marks that HTML has."""
    lines = [BEGIN, {"event": "start", "step": 0, "loss": 9.0, "accuracy": 0.5}]
    for step in range(1, steps + 1):
        accuracy = 0.5 + step / 2 / steps
        lines.append(
            {"event": "train", "step": step, "loss": 2.0 / step, "lr": 1e-4, "accuracy": accuracy, "memory": 1.0}
        )
        if step % 40 == 0:
            lines.append(
                {"event": "val", "step": step, "loss": 9.0 - step / 40, "accuracy": accuracy, "kl": 0.01 * step}
            )
    jsonl(folder / "metrics.jsonl", *lines)
    asked = [{"step": step, "run": "r1", "prompt": "<b>Hi?</b>", "answer": f"<i>{step}</i>"} for step in (0, 40, 80)]
    jsonl(folder / "samples.jsonl", *asked, {"step": 0, "run": "another", "prompt": "old", "answer": "not of this run"})
    pair = {"prompt": "<p>", "chosen": "yes", "reject": "no", "margin": "-1.5"}
    facts = RunFacts(run="r1", total=240, seconds=60.0, next=["python chat.py --load_model <M>"])
    facts.about = [["model", "<M>"]]
    facts.held_out = {"name": "accuracy", "value": 1.0, "step": 120}
    facts.wrong = {"count": 1, "of": 9, "step": 120, "pairs": [pair]}
    facts.notice("2026-01-02 03:04:06", 7, "the loss is <nan>")
    write_facts(folder, facts)
