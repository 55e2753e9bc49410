"""A process that appends three records to the log at its first argument and then kills itself."""

import os
import signal
import sys

from rwkv_rlhf.files import AppendLog, Sized

if __name__ == "__main__":
    log = AppendLog(sys.argv[1], Sized(b"TEST"), b"key\n")
    log.begin()
    for number in range(3):
        log.append(str(number).encode())
    os.kill(os.getpid(), signal.SIGKILL)
