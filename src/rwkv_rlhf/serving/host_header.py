"""The Host header of a request: a server that is for this machine only answers to this machine's names."""

LOCAL = ("localhost", "127.0.0.1", "::1")


def names_this_machine(host: str) -> bool:
    """Whether a Host header (with its port or without) is a name of this machine.

    A page of somebody else's, whose name was made to lead here, sends another one.
    """
    return host.strip("[]") in LOCAL or host.rpartition(":")[0].strip("[]") in LOCAL
