"""RWKV models. `VERSIONS` maps a version to its block class; a new version is a file and a line here."""

from src.model.rwkv7 import Block as Block7

VERSIONS = {"x070": Block7}
