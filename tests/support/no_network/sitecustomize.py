"""Loaded by Python before anything else where its folder is on PYTHONPATH: no connection leaves this machine.

Each try is written to the file that the variable REACHED names, and refused.
"""

import os
import sys


def local(address):
    """Whether an address is on this machine, or none of a network."""
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    return not isinstance(address, tuple) or host in ("", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


def watch(event, arguments):
    """Python's audit hook."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        there = local(arguments[1])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        there = arguments[0] is None or local((arguments[0],))
    elif event == "urllib.Request":
        there = False
    else:
        return
    if not there:
        with open(os.environ["REACHED"], "a") as file:
            file.write(f"{event} {arguments!r}\n")
        raise ConnectionRefusedError(f"no connection in this test: {event} {arguments!r}")


sys.addaudithook(watch)
