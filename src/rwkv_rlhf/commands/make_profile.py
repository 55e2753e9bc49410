"""Write a layer profile: python make_profile.py --make lora --layers 24 --rank 16 --top_rank 64 --output my.csv"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.plan.writing import profile_text
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import Parser
from rwkv_rlhf.settings.config import peft_modes
from rwkv_rlhf.settings.implementations import with_fact


def parser() -> Parser:
    """The flags of this command."""
    flags = Parser("Write a layer profile to start from.")
    flags.add_argument("--make", required=True, choices=peft_modes(), help="what every block learns")
    flags.add_argument("--layers", required=True, type=int, help="number of blocks of the model")
    flags.add_argument("--rank", type=int, default=0, help="rank of the adapters [16; Bone and MiSS 64]")
    flags.add_argument("--top_rank", type=int, default=0, help="rank of the last blocks, reached by doubling [rank]")
    flags.add_argument("--alpha", type=float, default=0.0, help="alpha at --rank; alpha / rank stays the same [2 rank]")
    flags.add_argument("--dropout", type=float, default=0.01, help="dropout before the adapters [0.01]")
    flags.add_argument("--lr_init", type=float, help="first learning rate [2e-4 to 12 blocks, 2e-5 to 32, else 1e-5]")
    flags.add_argument("--lr_final", type=float, help="last learning rate [a tenth of the first]")
    flags.add_argument("--weight_decay", type=float, default=0.0, help="decay of matrices and adapters [0]")
    of_tables = with_fact(tables.ADAPTERS, lambda facts: facts.embedding)
    flags.add_argument("--emb", default="freeze", choices=("freeze", "full", *of_tables), help="row emb [freeze]")
    flags.add_argument("--head", default="freeze", choices=("freeze", *peft_modes()), help="row head [freeze]")
    flags.add_argument("--reject", default="", help='RejectParts of every row that learns, e.g. "att.receptance,ln"')
    flags.add_argument("--output", default="", help="file to write; empty = stdout")
    return flags


def main(words: Sequence[str]) -> None:
    """Writes --output, or the profile to stdout. Raises ValueError."""
    args = parser().parse_args(words)
    if args.lr_final is not None and args.lr_init is None:
        raise ValueError("--lr_final needs --lr_init")
    text = profile_text(
        args.make,
        args.layers,
        rank=args.rank,
        top_rank=args.top_rank,
        alpha=args.alpha,
        dropout=args.dropout,
        lr_init=args.lr_init,
        lr_final=args.lr_final,
        weight_decay=args.weight_decay,
        emb=args.emb,
        head=args.head,
        reject=args.reject,
    )
    if args.output:
        with atomic_write(Path(args.output)) as file:
            file.write(text.encode())
    else:
        sys.stdout.write(text)
