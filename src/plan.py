"""Which tensor learns, how, and with which learning rate: a row per layer, from a layer profile (CSV) or from flags.

A tensor belongs to the row `emb` (emb, ln0), to its block's number, or to `head` (head, ln_out). No torch here: the
plan speaks of names only. Sentences write `{name}` for the flag of a setting; the command line spells them.
"""

import csv
import dataclasses
import re
from collections.abc import Sequence

from src.config import ADAPTERS, Config

MODES = ("full", "freeze", *ADAPTERS)
PARTS = ("att", "ffn", "ln", "time")
SCALED_MODES = ("lora", "dora")  # those whose update is scaled by Alpha / Rank

COMMON_COLUMNS = ("Layer", "Mode", "Rank", "Alpha", "Dropout")
COLUMNS = (
    *COMMON_COLUMNS,
    *("Weight_lr_init", "Weight_lr_final", "Weight_decay", "State_lr_init", "State_lr_final", "RejectParts"),
)
OLD_COLUMNS = (*COMMON_COLUMNS, "LISAProb", "LoRAProb", "LRScale")

# the small tensors of a block, by the last word of their names (RWKV-7; the other versions' all hold "time")
SMALL_7 = re.compile(r"x_[a-z]+|[wav][012]|g[12]|k_k|k_a|r_k")
ADAPTER_MATRIX = re.compile(r"lora_[AB]|bone|miss")
# (version, last word of the name) -> multiplier of the learning rate in the tradition
MULTIPLIERS = {
    ("x040", "time_decay"): 2.0,
    ("x040", "time_first"): 3.0,
    ("x050", "time_decay"): 2.0,
    ("x050", "time_first"): 3.0,
    ("x051", "time_decay"): 2.0,
    ("x051", "time_first"): 3.0,
    ("x052", "time_decay"): 2.0,
    ("x060", "time_decay"): 2.0,
    ("x070", "w0"): 2.0,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one layer does. Rates go from `init` to `final`; `reject` holds substrings of names that stay frozen."""

    layer: str
    mode: str
    rank: int
    alpha: float
    dropout: float
    lr_init: float
    lr_final: float
    weight_decay: float
    state_lr_init: float
    state_lr_final: float
    reject: tuple[str, ...] = ()

    def rejects(self, name: str) -> bool:
        """Whether the parameter `name` is frozen by RejectParts."""
        return any(part in name for part in self.reject)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One row for emb, for each block and for head, the parts of a block that adapter rows touch, and which learnt
    initial states (names as in `blocks.0.<name>`) every block trains, whatever its mode."""

    rows: dict[str, Row]
    parts: frozenset[str] = frozenset(PARTS)
    states: tuple[str, ...] = ()

    @property
    def modes(self) -> frozenset[str]:
        """The modes that occur."""
        return frozenset(row.mode for row in self.rows.values())

    def row_of(self, name: str) -> Row:
        """The row that the parameter or module `name` belongs to, e.g. `blocks.3.att.key.weight` to row 3."""
        words = name.split(".")
        if words[0] == "emb" or (words[0] == "blocks" and words[2:3] == ["ln0"]):
            return self.rows["emb"]
        if words[0] == "blocks":
            return self.rows[words[1]]
        assert words[0] in ("head", "ln_out"), f"no row for {name}"
        return self.rows["head"]

    def trains(self, name: str, version: str, limited: bool) -> bool:
        """Whether the tensor `name`, which is no adapter's, learns.

        version: x040 to x070, for the names of the small tensors; limited: adapter rows train their adapters only.
        """
        row = self.row_of(name)
        if row.rejects(name):
            return False
        if is_state(name):
            return name.endswith(self.states) if self.states else False
        if row.mode == "full":
            return True
        if row.mode == "freeze" or limited:
            return False
        if is_norm(name):
            return "ln" in self.parts
        return is_small(name, version) and "time" in self.parts

    def adapts(self, linear_name: str) -> Row | None:
        """The row whose adapter the matrix of the module `linear_name` (e.g. `blocks.3.att.key`) gets, or None."""
        row = self.row_of(linear_name)
        if row.mode not in ADAPTERS or row.rejects(linear_name + ".weight"):
            return None
        words = linear_name.split(".")
        if words[0] == "blocks" and words[2] in ("att", "ffn") and words[2] not in self.parts:
            return None
        return row

    def group(self, name: str, version: str, layerwise: bool) -> tuple[float, float, float]:
        """(lr_init, lr_final, weight_decay) of the trained tensor `name`, adapters' tensors included.

        layerwise: apply the tradition's multipliers. Only matrices decay: not LayerNorms, not small tensors.
        """
        row = self.row_of(name)
        if is_state(name):
            return row.state_lr_init, row.state_lr_final, 0.0
        times = MULTIPLIERS.get((version, name.split(".")[-1]), 1.0) if layerwise else 1.0
        decay = row.weight_decay if is_matrix(name) else 0.0
        return row.lr_init * times, row.lr_final * times, decay


def is_state(name: str) -> bool:
    """Whether `name` is a learnt initial state (state tuning)."""
    return name.split(".")[-1].endswith("_state")


def is_norm(name: str) -> bool:
    """Whether `name` is the weight or bias of a LayerNorm or of ln_x."""
    return name.split(".")[-2].startswith("ln")


def is_small(name: str, version: str) -> bool:
    """Whether `name` is one of the small vectors or low-rank factors of a block."""
    last = name.split(".")[-1]
    return bool(SMALL_7.fullmatch(last)) if version == "x070" else "time" in last


def is_matrix(name: str) -> bool:
    """Whether `name` is a whole matrix or a factor of an adapter: what weight decay may touch."""
    last = name.split(".")[-1]
    return (last == "weight" and not is_norm(name)) or bool(ADAPTER_MATRIX.fullmatch(last))


def plan_for(config: Config, n_layer: int) -> Plan:
    """The plan that the settings ask for: the layer profile, or one made from {peft} and its companions.

    n_layer: blocks of the model. Raises ValueError as `read_profile` and `make_plan` do.
    """
    rates = {"lr_init": config.lr_init, "lr_final": config.lr_final, "weight_decay": config.weight_decay}
    if config.layer_profile:
        plan = read_profile(config.layer_profile, n_layer, own_rates=config.lr_advanced, **rates)
    else:
        adapter = {"rank": config.lora_r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        plan = make_plan(config.peft, n_layer, parts=config.lora_parts, layers=config.lora_layers, **adapter, **rates)
    tuned = config.state
    shifts = ("att.shift_state", "ffn.shift_state") if config.state_shift else ()
    return dataclasses.replace(plan, states=("att.time_state", *shifts) if tuned else ())


def make_plan(
    peft: str,
    n_layer: int,
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.01,
    parts: str = "att,ffn,ln,time",
    layers: str = "",
    lr_init: float,
    lr_final: float,
    weight_decay: float = 0.0,
) -> Plan:
    """The same mode for all blocks.

    peft: `full` trains everything, emb and head too (training from zero needs them); an adapter or `state` leaves emb
    and head frozen. parts: comma list out of att, ffn, ln, time; layers: blocks that learn, such as "0-3 25-31", the
    others are frozen. Raises ValueError for unknown words and for block numbers that the model does not have.
    """
    if peft not in ("full", "state", *ADAPTERS):
        raise ValueError(f"{{peft}} {peft}: must be one of full, state, {', '.join(ADAPTERS)}")
    chosen = parse_layers(layers, n_layer)
    touched = frozenset(word.strip() for word in parts.split(",") if word.strip())
    if not touched <= set(PARTS):
        raise ValueError(f"{{lora_parts}} {parts}: must be a comma list of {', '.join(PARTS)}")

    def row(layer: str) -> Row:
        inside = peft == "full" or (layer.isdigit() and int(layer) in chosen)
        mode = peft if inside and peft != "state" else "freeze"
        return Row(layer, mode, rank, alpha, dropout, lr_init, lr_final, weight_decay, lr_init, lr_final)

    return Plan({layer: row(layer) for layer in layer_names(n_layer)}, touched)


def layer_names(n_layer: int) -> list[str]:
    """emb, 0, 1, ..., head."""
    return ["emb", *map(str, range(n_layer)), "head"]


def parse_layers(text: str, n_layer: int) -> frozenset[int]:
    """The block numbers in "0-3 25-31" (blanks or commas between); all if `text` is empty. Raises ValueError."""
    if not text.strip():
        return frozenset(range(n_layer))
    chosen: set[int] = set()
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not match:
            raise ValueError(f"{{lora_layers}} {text}: {word!r} is not a block such as 3 or a range such as 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < n_layer:
            raise ValueError(f"{{lora_layers}} {text}: {word!r} is not within blocks 0-{n_layer - 1}")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


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
    rates = (lr_init, lr_final, weight_decay)
    return Plan({layer: read_row(seen[layer], rates, own_rates) for layer in layer_names(n_layer)})


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
        raise ValueError(f"{path}:{number}: {len(cells)} cells under {len(header)} columns; {hint}")
    return Line(path, number, dict.fromkeys(header, "") | dict(zip(header, cells)))


def check_layers(path: str, lines: list[Line], n_layer: int) -> dict[str, Line]:
    """Lines by layer; raises ValueError unless emb, every block and head have exactly one."""
    seen: dict[str, Line] = {}
    for line in lines:
        layer = line.cells["Layer"]
        if not re.fullmatch(r"emb|head|0|[1-9][0-9]*", layer):
            raise line.wrong("Layer", f"emb, head or a block from 0 to {n_layer - 1}")
        if layer in seen:
            raise line.wrong("Layer", f"unique (line {seen[layer].number} has it too)")
        seen[layer] = line
    blocks = {int(layer) for layer in seen if layer.isdigit()}
    missing = sorted(set(range(n_layer)) - blocks)
    extra = sorted(blocks - set(range(n_layer)))
    if missing:
        found = n_layer - len(missing)
        rows = f"row {missing[0]} is" if len(missing) == 1 else f"rows {', '.join(map(str, missing))} are"
        raise ValueError(f"{path} has rows for {found} of {n_layer} blocks: {rows} missing")
    if extra:
        where = f"the first is row {extra[0]} in line {seen[str(extra[0])].number}"
        raise ValueError(
            f"{path} has rows for {len(blocks)} blocks, the model has {n_layer}: {len(extra)} too many, {where}"
        )
    for layer in ("emb", "head"):
        if layer not in seen:
            raise ValueError(f"{path} has no row for {layer}")
    return seen


def read_row(line: Line, rates: tuple[float, float, float], own_rates: bool) -> Row:
    """One line as a Row; rates: lr_init, lr_final, weight_decay of the command line. Raises ValueError."""
    mode = line.cells["Mode"].lower()
    if mode not in MODES:
        raise line.wrong("Mode", f"one of {', '.join(MODES)}")
    adapter = mode in ADAPTERS
    rank = line.real("Rank", None if adapter else 0.0, 1.0 if adapter else 0.0, "a whole number >= 1")
    if rank != int(rank):
        raise line.wrong("Rank", "a whole number >= 1")
    alpha = line.real("Alpha", None if mode in SCALED_MODES else 0.0, legal="a number > 0")
    if alpha == 0 and mode in SCALED_MODES:
        raise line.wrong("Alpha", "a number > 0")
    dropout = line.real("Dropout", 0.0, legal="a number from 0 to below 1")
    if dropout >= 1 and adapter:
        raise line.wrong("Dropout", "a number from 0 to below 1")
    reject = tuple(part.strip() for part in line.cells.get("RejectParts", "").split(",") if part.strip())
    return Row(line.cells["Layer"], mode, int(rank), alpha, dropout, *read_rates(line, mode, rates, own_rates), reject)


def read_rates(
    line: Line, mode: str, rates: tuple[float, float, float], own_rates: bool
) -> tuple[float, float, float, float, float]:
    """Weight_lr_init, Weight_lr_final, Weight_decay, State_lr_init, State_lr_final of a line."""
    if "LRScale" in line.cells:
        scale = line.real("LRScale", 1.0)
        init, final, decay = rates[0] * scale, rates[1] * scale, rates[2]
        return init, final, decay, init, final
    unused = 0.0 if mode == "freeze" else None
    init, final = line.real("Weight_lr_init", unused), line.real("Weight_lr_final", unused)
    decay = line.real("Weight_decay", 0.0)
    state_init, state_final = line.real("State_lr_init", init), line.real("State_lr_final", final)
    return (init, final, decay, state_init, state_final) if own_rates else (*rates, rates[0], rates[1])
