"""Makes the parser of every command that has a file for its flags, and prints their names and whether PyTorch came."""

import importlib
import json
import pkgutil
import sys

from rwkv_rlhf.commands import PARSERS

names = [module.name for module in pkgutil.iter_modules(importlib.import_module(PARSERS).__path__)]
for name in names:
    importlib.import_module(f"{PARSERS}.{name}").parser()
print(json.dumps([names, "torch" in sys.modules]))
