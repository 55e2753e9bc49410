"""One exception ends the program with one status, whether one process trains or many."""

import builtins
import errno

import pytest

from rwkv_rlhf.distributed.watchdog import Watchdog, heartbeat
from rwkv_rlhf.settings.command_line import UsageError, run

MISTAKES = {ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError}
BUILT_IN = sorted(
    {found for found in vars(builtins).values() if isinstance(found, type) and issubclass(found, BaseException)},
    key=lambda found: found.__name__,
)
# GeneratorExit and bare BaseExceptions are no end of a program
ENDS = [UsageError, *(found for found in BUILT_IN if issubclass(found, Exception | KeyboardInterrupt | SystemExit))]


def made(kind):
    """An error of this class, with the arguments that it needs."""
    if issubclass(kind, UnicodeTranslateError):
        return kind("text", 0, 1, "wrong")
    if issubclass(kind, UnicodeError) and kind is not UnicodeError:
        return kind("utf-8", b"x" if kind is UnicodeDecodeError else "x", 0, 1, "wrong")
    if issubclass(kind, BaseExceptionGroup):
        return kind("several", [ValueError("inner")])
    return kind(errno.EIO, "wrong", "x.csv") if issubclass(kind, OSError) else kind("wrong")


def status_alone(error):
    def main(words):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main, [])
    return 1 if isinstance(caught.value.code, str) else caught.value.code  # as the interpreter ends with a text


def status_of_a_rank(error, monkeypatch):
    """Of rank 1, which ends itself; what rank 0 raises goes on to `run`."""
    found = []
    watchdog = Watchdog(1, 2, {}, 1.0, parent=None)
    monkeypatch.setattr(watchdog, "_leave", found.append)
    monkeypatch.setattr("rwkv_rlhf.distributed.watchdog.time.sleep", lambda seconds: None)
    with pytest.raises(type(error)), watchdog:
        raise error
    return found[0]


@pytest.mark.parametrize("kind", ENDS, ids=lambda kind: kind.__name__)
def test_alone_and_under_several_ranks(kind, monkeypatch):
    """If this breaks, a script that starts training reads 1 with --devices 2 where it read 2 without."""
    if kind is SystemExit:
        for code, status in ((None, 0), (0, 0), (3, 3), ("a sentence", 1)):
            assert (status_alone(SystemExit(code)) or 0) == status_of_a_rank(SystemExit(code), monkeypatch) == status
        return
    expected = 130 if kind is KeyboardInterrupt else 2 if issubclass(kind, tuple(MISTAKES)) else 1
    assert status_alone(made(kind)) == status_of_a_rank(made(kind), monkeypatch) == expected


def test_a_heartbeat_reaches_the_watchdog_that_watches():
    """From anywhere below, and nobody when nobody watches."""
    watchdog = Watchdog(1, 2, {}, 1.0, parent=None)
    heartbeat("nothing yet")
    watchdog.over.set()  # its thread looks once and ends
    watchdog._finish = lambda: None
    with watchdog:
        heartbeat("forward pass")
    heartbeat("nothing more")
    assert (watchdog.ticks, watchdog.what) == (1, "forward pass")
