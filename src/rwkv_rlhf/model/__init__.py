"""RWKV models. `VERSIONS` maps a version to its block class; a new version is a file and a line here."""

from rwkv_rlhf.model.rwkv4 import Block as Block4
from rwkv_rlhf.model.rwkv5 import Block50, Block51, Block52
from rwkv_rlhf.model.rwkv6 import Block as Block6
from rwkv_rlhf.model.rwkv7 import Block as Block7

VERSIONS = {"x040": Block4, "x050": Block50, "x051": Block51, "x052": Block52, "x060": Block6, "x070": Block7}
