"""Which tensor learns, how, and with which learning rate: a row per layer, from a layer profile (CSV) or from flags.

A tensor belongs to the row `emb` (emb, ln0), to its block's number, or to `head` (head, ln_out). No torch here: the
plan speaks of names only. `python make_profile.py --help` writes profiles.
"""

from rwkv_rlhf.plan.from_flags import make_plan, parse_layers, plan_for
from rwkv_rlhf.plan.profile import COLUMNS, OLD_COLUMNS, read_profile
from rwkv_rlhf.plan.rows import (
    PARTS,
    Plan,
    Rates,
    Row,
    is_block_matrix,
    is_matrix,
    is_new,
    is_norm,
    is_scalar_head,
    is_scaled,
    is_small,
    is_state,
    is_token_table,
    layer_names,
    row_modes,
)

__all__ = [
    "COLUMNS",
    "OLD_COLUMNS",
    "PARTS",
    "Plan",
    "Rates",
    "Row",
    "is_block_matrix",
    "is_matrix",
    "is_new",
    "is_norm",
    "is_scalar_head",
    "is_scaled",
    "is_small",
    "is_state",
    "is_token_table",
    "layer_names",
    "make_plan",
    "parse_layers",
    "plan_for",
    "read_profile",
    "row_modes",
]
