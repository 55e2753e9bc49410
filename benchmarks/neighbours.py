"""A training step on a quiet machine and beside a program that keeps one core busy: how many times longer it takes.

    python benchmarks/neighbours.py [--turns 5] [--modes full lora] [--json F]

RWKV-7 L4-D768, fp32, one row of 512 tokens, all cores. With OMP_WAIT_POLICY=passive, which the commands set unless
somebody typed another (threads that wait sleep), beside the library's own way (they spin for a millisecond) and
`active` (they spin). Each kind of run has a process that is stopped between its turns; in each turn every one makes a
step alone and one beside the busy program. Of two cores, one of them busy, a step may take 2.2 times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from pathlib import Path

from step import size_flags
from stepping import Work, busy, spread, warm

TARGET = 2.2  # times the quiet step, with one of two cores busy
POLICIES = ("passive", "unset", "active")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def environment(policy: str) -> dict[str, str]:
    """Of a process whose threads wait like this."""
    found = {name: text for name, text in os.environ.items() if name not in WAITING}
    return found if policy == "unset" else found | {"OMP_WAIT_POLICY": policy}


def measured(works: list[Work], turns: int) -> dict[tuple[str, str, bool], list[float]]:
    """Seconds of steps by mode, policy and whether a core was busy; everything takes turns."""
    kinds = {(work.mode, policy): (work, environment(policy)) for work in works for policy in POLICIES}
    times: dict[tuple[str, str, bool], list[float]] = {(*key, loaded): [] for key in kinds for loaded in (False, True)}
    with warm(kinds) as sides:
        for _ in range(turns):
            for loaded in (False, True):
                with busy() if loaded else contextlib.nullcontext():
                    for key, side in sides.items():
                        times[*key, loaded].append(side())
    return times


def main() -> None:
    """Print one row for each mode and way to wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    size_flags(parser)
    parser.set_defaults(layers=4)
    flags = parser.parse_args()
    size = (flags.layers, flags.width, flags.vocab)
    works = [Work("ours", mode, "x070", flags.tokens, *size) for mode in flags.modes]
    times = measured(works, flags.turns)
    print(
        f"{os.cpu_count()} cores, one of them busy; seconds a step (fastest - slowest); target {TARGET} on two cores\n"
    )
    print("| step | threads wait | quiet | busy | ratio of the medians | target |\n|---|---|---|---|---|---|")
    for mode in flags.modes:
        for policy in POLICIES:
            quiet, loaded = times[mode, policy, False], times[mode, policy, True]
            ratio = statistics.median(loaded) / statistics.median(quiet)
            verdict = f"{TARGET}: {'met' if ratio <= TARGET else 'missed'}" if policy == POLICIES[0] else ""
            print(f"| {mode} | {policy} | {spread(quiet)} | {spread(loaded)} | {ratio:.2f} | {verdict} |")
    if flags.json:
        flags.json.write_text(json.dumps({" ".join(map(str, key)): found for key, found in times.items()}, indent=1))


if __name__ == "__main__":
    main()
