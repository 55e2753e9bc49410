"""Runs that can be killed, without importing everything for each: `run_server.py LOG`.

Each line of stdin is the words of a training run, made by a process of its own whose stderr goes to LOG. Answers with
the number of that process, and then with its exit status (-9 = killed).
"""

import os
import sys

from rwkv_rlhf.commands import train
from rwkv_rlhf.reports import curves
from rwkv_rlhf.settings.command_line import run
from rwkv_rlhf.training import run as training_run
from rwkv_rlhf.training import start

ONCE = (training_run, start)  # imported here, so that no child has to


def main(log_file):
    """Until stdin ends."""
    curves.draw_curves = lambda folder: None  # takes longer than the training
    for line in sys.stdin:
        child = os.fork()
        if not child:
            with open(log_file, "a") as log:
                os.dup2(log.fileno(), 2)
            run(train.main, line.split())
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
