"""A thread in each rank that notices when another one fails, dies or hangs, and ends this one, naming that rank.

A rank that waits for the others inside a collective operation cannot do that itself: it would wait for ever, or until
the library ends with an error about sockets. The ranks tell each other, through the store at which they met, what
they are doing (`heartbeat`) and how often that has changed. A rank that fails says so before it ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rwkv_rlhf.distributed.ranks import barrier
from rwkv_rlhf.settings.command_line import one_line, spelled, wants_debug
from rwkv_rlhf.settings.exit_status import exit_status, sentence_of

GRACE = 3.0  # seconds in which a rank may still fail by itself, with a better sentence, after another has
LOST = 20.0  # seconds without a sign of life after which a rank is suspected, once something has gone wrong
FAILED = "failed"  # the key under which the first failure is announced
# words in what the libraries raise when a rank at the other end of a connection is gone
BROKEN = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "socket", "timed out", "store")

_current: ContextVar[Watchdog | None] = ContextVar("the watchdog of this process", default=None)


def heartbeat(what: str) -> None:
    """Says that this rank is about to do `what`: a sign that it does not hang. Before the first one nothing counts as
    hanging, as nobody knows how long a model takes to load. To be called on the main thread."""
    watchdog = _current.get()
    if watchdog is not None:
        watchdog.ticks += 1
        watchdog.what = what


class Watchdog:
    """Watches the other ranks from inside the block.

    children: those that this process has started, by rank. parent: the rank whose process (or whose launcher) started
    this one, so that its end is this one's too; None for the first of a machine. timeout: minutes.
    """

    def __init__(
        self, rank: int, world: int, children: dict[int, subprocess.Popen[bytes]], timeout: float, *, parent: int | None
    ) -> None:
        self.rank, self.world, self.children, self.limit = rank, world, children, 60 * timeout
        self.pause = max(0.5, world / 32)
        self.ticks, self.what = 0, "starting"
        self.parent, self.started_by = parent, os.getppid()
        self.heard: dict[
            int, tuple[float, dict[str, Any]]
        ] = {}  # rank -> when it last gave a sign of life, and what it said
        self.changed = time.monotonic()  # when any rank last made progress
        self.store: TCPStore | None = None
        self.over = threading.Event()
        self.lock = threading.Lock()  # a store is no place for two threads

    def __enter__(self) -> Watchdog:
        self._before = _current.set(self)
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()
        return self

    def begin(self, address: str, port: int) -> None:
        """Connect to the store of the ranks; from now on they hear of each other."""
        with self.lock:
            self.store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=LOST))
            self._say(self.store)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _current.reset(self._before)
        if error is None:
            self._finish()
        else:
            self._fail(error)

    def _finish(self) -> None:
        """A good end: rank 0, which holds the store, stays until the others no longer need it."""
        barrier()
        self.over.set()
        with self.lock:
            self.store = None
        barrier()
        distributed.destroy_process_group()
        for child in self.children.values():
            child.wait()

    def _fail(self, error: BaseException) -> None:
        """Tells the others that this rank fails, unless another rank failed first; then that one is named."""
        status = exit_status(error)
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in BROKEN):
            self._wait_for_culprit()  # somebody else's failure, seen from here
        self._announce(status, f"rank {self.rank}: {sentence_of(error)}")
        if self.rank:  # rank 0 reports for all
            if wants_debug(sys.argv[1:]):
                traceback.print_exception(error)
            self._wait_for_report()
            self._leave(status)
        self.over.set()
        time.sleep(2 * self.pause + GRACE)  # the store is here: let the others read it
        self._end_children()

    def _wait_for_culprit(self) -> None:
        """The thread ends this process once it knows which rank failed; if none says so, one has stopped responding."""
        time.sleep(LOST)
        now = time.monotonic()
        silent = [rank for rank, (when, _) in self.heard.items() if now - when > LOST / 2]
        if silent:
            self._end(f"{self._names(silent)} no longer responds", 1, silent)

    def _run(self) -> None:
        while not self.over.wait(self.pause):
            failure = None
            try:
                self._check_deaths()
                with self.lock:
                    failure = self._exchange(self.store) if self.store is not None else None
            except Exception as error:  # the store is gone, and with it the rank that held it
                if not self.over.wait(GRACE):
                    self._end(f"rank 0 no longer responds ({type(error).__name__})", 1, [0])
                return
            if failure is not None and not self.over.wait(GRACE):
                self._end(failure["sentence"], failure["status"])
            self._check_hang()

    def _say(self, store: TCPStore) -> None:
        """Publishes what this rank does."""
        words = {"ticks": self.ticks, "what": self.what, "host": socket.gethostname(), "pid": os.getpid()}
        store.set(f"rank{self.rank}", json.dumps(words | {"time": time.monotonic()}))

    def _exchange(self, store: TCPStore) -> dict[str, Any] | None:
        """Publishes what this rank does and reads the others; returns the first failure that a rank has announced."""
        self._say(store)
        names = [f"rank{rank}" for rank in range(self.world)]
        if not store.check(names):
            return None
        for rank, text in enumerate(store.multi_get(names)):
            found = json.loads(text)
            last = self.heard.get(rank)
            if last is None or found["time"] != last[1]["time"]:
                if last is None or found["ticks"] != last[1]["ticks"]:
                    self.changed = time.monotonic()
                self.heard[rank] = (time.monotonic(), found)
        failure: dict[str, Any] | None = json.loads(store.get(FAILED)) if store.check([FAILED]) else None
        return failure

    def _check_deaths(self) -> None:
        """Ends this process when a rank that it started died without a report, or when its own parent died."""
        for rank, child in self.children.items():
            code = child.poll() or 0
            if code == 0:  # it runs, or has ended well
                continue
            with self.lock:
                said = self.store is not None and self.store.check([FAILED])
            if not said:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                self._end(f"rank {rank} (process {child.pid}) {how}", 1, [rank])
        if self.parent is not None and self.started_by != os.getppid():
            self._end(f"rank {self.parent}, or what started it, has died", 1, [self.parent])

    def _check_hang(self) -> None:
        now = time.monotonic()
        if self.ticks == 0 or now - self.changed < self.limit:
            return
        fewest = min(found["ticks"] for _, found in self.heard.values())
        behind = [rank for rank, (_, found) in self.heard.items() if found["ticks"] == fewest]
        stopped = [rank for rank, (when, _) in self.heard.items() if now - when > self.limit / 2]
        named = stopped or behind
        if len(named) == self.world:
            who, doing = "no rank has made progress", f"rank {self.rank} is at: {self.what}"
        else:
            who, doing = f"{self._names(named)} has made no progress", f"it is at: {self.heard[named[0]][1]['what']}"
        self._end(f"{who} for --timeout {self.limit / 60:g} minutes; {doing}", 1, stopped)

    def _names(self, numbers: list[int]) -> str:
        known = [(rank, self.heard[rank][1]) for rank in numbers[:8]]
        return ", ".join(f"rank {rank} (process {found['pid']} on {found['host']})" for rank, found in known)

    def _announce(self, status: int, sentence: str) -> None:
        with suppress(RuntimeError), self.lock:  # nobody may be left to hear it
            if self.store is not None and not self.store.check([FAILED]):
                found = {"status": status, "sentence": one_line(spelled(sentence))}
                self.store.set(FAILED, json.dumps(found))

    def _end(self, sentence: str, status: int, lost: Collection[int] = ()) -> None:
        """Ends this process, whatever its main thread waits for. The first rank that is not `lost` says why."""
        self._announce(status, sentence)
        if self.rank == min(set(range(self.world)) - set(lost), default=self.rank):
            sys.stderr.write(f"error: {sentence}; all ranks are stopped\n")
        if self.rank == 0:
            time.sleep(2 * self.pause + GRACE)
        else:
            self._wait_for_report()
        self._end_children()
        self._leave(status)

    def _wait_for_report(self) -> None:
        """Stays until rank 0 has said why: launchers kill it when another rank ends before it."""
        end = time.monotonic() + 4 * (self.pause + GRACE)
        with suppress(RuntimeError), self.lock:  # its end is the end of the store
            while self.store is not None and time.monotonic() < end:
                time.sleep(self.pause / 2)
                self.store.check([FAILED])

    def _leave(self, status: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _end_children(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + GRACE
            for child in self.children.values():
                if child.poll() is None:
                    child.send_signal(number)
            while any(child.poll() is None for child in self.children.values()) and time.monotonic() < end:
                time.sleep(0.05)
