"""How the program ends: one status and one sentence for each exception, alone and under several ranks."""

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
# what an open() or a mkdir() says of a path that the user gave
PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


class Failure(RuntimeError):
    """The end of a command that is nobody's mistake on the command line; its message is a whole sentence."""


def exit_status(error: BaseException) -> int:
    """The status of a program that ends with `error`: 2 for the user's mistakes, 130 for Ctrl+C, else 1.

    The user's mistakes are ValueError and paths that cannot be opened. A SystemExit says its status itself.
    """
    if isinstance(error, SystemExit):
        return OK if error.code is None else error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISTAKE if isinstance(error, (ValueError, *PATH_ERRORS)) else FAILED


def sentence_of(error: BaseException) -> str:
    """What the user reads of `error`; flags may still be written as `{name}`."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl+C"
    if isinstance(error, PATH_ERRORS) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if exit_status(error) == MISTAKE or isinstance(error, Failure):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("rwkv_rlhf"):
        return f"the package {error.name} is not installed: pip install -r requirements.txt, or pip install ."
    return f"{type(error).__name__}: {error}"
