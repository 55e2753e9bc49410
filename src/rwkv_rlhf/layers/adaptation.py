"""How one matrix is adapted, and how its adapter's random numbers are drawn. Sidecars store exactly this record.

Legend: r rank.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from rwkv_rlhf.settings import tables


class RankError(ValueError):
    """A rank that the matrix of a layer cannot have. Whoever knows the name of the layer adds it."""


@dataclass(frozen=True)
class Adaptation:
    """`mode` is a key of ADAPTERS; the update is multiplied by `scaling`: alpha / rank, alpha / sqrt(rank), or 1."""

    mode: str
    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0

    @classmethod
    def make(cls, mode: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> Adaptation:
        """From what a profile row says; modes without a scale or dropout ignore it. `rslora`: arXiv 2312.03732."""
        facts = tables.ADAPTERS[mode]
        scaling = alpha / (math.sqrt(rank) if rslora else rank) if facts.scaled else 1.0
        return cls(mode, rank, alpha, scaling, dropout if facts.dropout else 0.0)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's name only: the order of creation changes nothing."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
