"""A command where PyTorch cannot be imported: `without_torch.py COMMAND WORDS ...`."""

import sys

from rwkv_rlhf.commands import main

if __name__ == "__main__":
    sys.modules["torch"] = None
    main()
