"""What a program sees of its process, as JSON; then it ends: `about_process.py e7`, a sentence, or the number of a
signal."""

import json
import os
import sys

if __name__ == "__main__":
    parent, threads = os.getppid(), len(os.listdir("/proc/self/task"))
    search = [sys.path[:3], "rwkv_rlhf" in sys.modules]
    said = [os.getpid(), parent, sys.argv, os.getcwd(), sys.stdin.read(), os.environ["RANK"], search, threads]
    print(json.dumps(said), flush=True)
    end = sys.argv[1]
    if end.isdecimal():
        os.kill(os.getpid(), int(end))
    sys.exit(int(end[1:]) if end[1:].isdecimal() else end)
