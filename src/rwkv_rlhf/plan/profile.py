"""Layer profiles: CSV files with one row for emb, for each block and for head, perhaps for scalar heads too
(docs/layer-profiles.md)."""

import csv
import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_rlhf.plan.rows import Plan, Rates, Row, is_scaled, layer_names, row_modes
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.counted import counted

COMMON_COLUMNS = ("Layer", "Mode", "Rank", "Alpha", "Dropout")
COLUMNS = (
    *COMMON_COLUMNS,
    *("Weight_lr_init", "Weight_lr_final", "Weight_decay", "State_lr_init", "State_lr_final", "RejectParts"),
)
MAKE = "python make_profile.py --make lora --layers {} makes one"
OLD_COLUMNS = (*COMMON_COLUMNS, "LISAProb", "LoRAProb", "LRScale")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a profile: its cells by column, and where it stands."""

    path: str
    number: int
    cells: dict[str, str]

    def wrong(self, column: str, legal: str) -> ValueError:
        """The error for a cell: file, line, column, value, what is legal."""
        return ValueError(f"{self.path}:{self.number}: column {column}: {self.cells[column]!r}, must be {legal}")

    def real(self, column: str, default: float | None, least: float = 0.0, legal: str = "a number >= 0") -> float:
        """A cell as a finite number >= least; an empty cell is `default`, or an error where that is None."""
        text = self.cells[column]
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(column, legal) from None
        if not least <= value < float("inf"):
            raise self.wrong(column, legal)
        return value


def read_profile(
    path: str, n_layer: int, *, lr_init: float, lr_final: float, weight_decay: float, own_rates: bool = True
) -> Plan:
    """Reads a layer profile for a model of `n_layer` blocks.

    Today's header has a learning rate in each row; with the older one (LISAProb, LoRAProb, LRScale), and with
    own_rates=False, `lr_init`, `lr_final` and `weight_decay` hold, times LRScale. Raises ValueError with file, line,
    column, value and the legal values.
    """
    lines = read_lines(path)
    seen = check_layers(path, lines, n_layer)
    rates = Rates(lr_init, lr_final, weight_decay)
    layers = [layer for layer in (*layer_names(n_layer), *tables.SCALAR_HEADS) if layer in seen]
    return Plan({layer: read_row(seen[layer], rates, own_rates) for layer in layers})


def read_lines(path: str) -> list[Line]:
    """The lines of a profile behind its header; UTF-8, with or without BOM. Raises ValueError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            table = [
                (reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))
            ]
    except FileNotFoundError:
        raise ValueError(f"{{layer_profile}} {path}: there is no such file") from None
    except UnicodeDecodeError as mistake:
        raise ValueError(f"{path}: not UTF-8 text (byte {mistake.start})") from None
    except csv.Error as mistake:
        raise ValueError(f"{path}: not a CSV file: {mistake}") from None
    if not table:
        raise ValueError(f"{path}: empty; the first line must be {','.join(COLUMNS)}")
    header = table[0][1]
    while header and not header[-1]:
        header.pop()  # spreadsheets leave empty columns at the end
    if set(header) not in (set(COLUMNS), set(OLD_COLUMNS)) or len(set(header)) != len(header):
        raise ValueError(f"{path}:{table[0][0]}: the header must be {','.join(COLUMNS)}, not {','.join(header)}")
    return [line_of(path, number, header, cells) for number, cells in table[1:]]


def line_of(path: str, number: int, header: Sequence[str], cells: Sequence[str]) -> Line:
    """A line's cells by column; missing ones at the end are empty. Raises ValueError for too many."""
    if any(cells[len(header) :]):
        hint = "put quotes around a list in RejectParts"
        raise ValueError(
            f"{path}:{number}: {counted(len(cells), 'cell')} under {counted(len(header), 'column')}; {hint}"
        )
    return Line(path, number, dict.fromkeys(header, "") | dict(zip(header, cells)))


def check_layers(path: str, lines: list[Line], n_layer: int) -> dict[str, Line]:
    """Lines by layer; raises ValueError unless emb, every block and head have exactly one, scalar heads at most."""
    seen: dict[str, Line] = {}
    for line in lines:
        layer = line.cells["Layer"]
        if layer not in tables.SCALAR_HEADS and not re.fullmatch(r"emb|head|0|[1-9][0-9]{0,8}", layer):
            heads = " or ".join(tables.SCALAR_HEADS)
            raise line.wrong("Layer", f"emb, head, a block from 0 to {n_layer - 1}, {heads}")
        if layer in seen:
            raise line.wrong("Layer", f"unique (line {seen[layer].number} has it too)")
        seen[layer] = line
    blocks = {int(layer) for layer in seen if layer.isdigit()}
    missing = sorted(set(range(n_layer)) - blocks)
    extra = sorted(blocks - set(range(n_layer)))
    if missing:
        found = n_layer - len(missing)
        rows = f"row {missing[0]} is" if len(missing) == 1 else f"rows {', '.join(map(str, missing))} are"
        raise ValueError(f"{path} has rows for {found} of {n_layer} blocks: {rows} missing; {MAKE.format(n_layer)}")
    if extra:
        where = f"the first is row {extra[0]} in line {seen[str(extra[0])].number}"
        raise ValueError(
            f"{path} has rows for {len(blocks)} blocks, the model has {n_layer}: {len(extra)} too many, {where}; "
            f"{MAKE.format(n_layer)}"
        )
    for layer in ("emb", "head"):
        if layer not in seen:
            raise ValueError(f"{path} has no row for {layer}")
    return seen


class RowRates(NamedTuple):
    """The rates of a row, by the names of the fields of `Row`."""

    lr_init: float
    lr_final: float
    weight_decay: float
    state_lr_init: float
    state_lr_final: float


def read_row(line: Line, rates: Rates, own_rates: bool) -> Row:
    """One line as a Row; `rates` are those of the command line. Raises ValueError."""
    mode = line.cells["Mode"].lower()
    if mode not in row_modes():
        raise line.wrong("Mode", f"one of {', '.join(row_modes())}")
    adapter = mode in tables.ADAPTERS
    rank = line.real("Rank", None if adapter else 0.0, 1.0 if adapter else 0.0, "a whole number >= 1")
    if rank != int(rank):
        raise line.wrong("Rank", "a whole number >= 1")
    alpha = line.real("Alpha", None if is_scaled(mode) else 0.0, legal="a number > 0")
    if alpha == 0 and is_scaled(mode):
        raise line.wrong("Alpha", "a number > 0")
    dropout = line.real("Dropout", 0.0, legal="a number from 0 to below 1")
    if dropout >= 1 and adapter:
        raise line.wrong("Dropout", "a number from 0 to below 1")
    reject = tuple(part.strip() for part in line.cells.get("RejectParts", "").split(",") if part.strip())
    return Row(
        layer=line.cells["Layer"],
        mode=mode,
        rank=int(rank),
        alpha=alpha,
        dropout=dropout,
        **read_rates(line, mode, rates, own_rates)._asdict(),
        reject=reject,
        where=f"{line.path}:{line.number}",
    )


def read_rates(line: Line, mode: str, rates: Rates, own_rates: bool) -> RowRates:
    """The rates of a line: its own or, with `own_rates` False and under the older header, those of the command line."""
    if "LRScale" in line.cells:
        scale = line.real("LRScale", 1.0)
        init, final = rates.lr_init * scale, rates.lr_final * scale
        return RowRates(init, final, rates.weight_decay, init, final)
    unused = 0.0 if mode == "freeze" else None
    init, final = line.real("Weight_lr_init", unused), line.real("Weight_lr_final", unused)
    decay = line.real("Weight_decay", 0.0)
    state_init, state_final = line.real("State_lr_init", init), line.real("State_lr_final", final)
    if own_rates:
        return RowRates(init, final, decay, state_init, state_final)
    return RowRates(*rates, rates.lr_init, rates.lr_final)
