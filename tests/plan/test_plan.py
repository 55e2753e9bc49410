"""Layer profiles: what is read, what is refused, and which tensor learns how fast."""

import dataclasses
import re

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.commands.make_profile import main as write_profile
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.layout import plan_layout
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.plan import COLUMNS, Plan, make_plan, parse_layers, plan_for, read_profile, row_modes
from rwkv_rlhf.plan.profile import MAKE
from rwkv_rlhf.settings.config import Config
from tests.support.models import random_tensors
from tests.support.source_files import ROOT

SHIPPED = {
    "24_TEST": "--make lora --layers 24 --top_rank 64",
    "32_TEST": "--make lora --layers 32 --top_rank 64",
    **{
        f"{layers}_TEST_{kind}": f"--make {kind.lower()} --layers {layers}"
        for layers in (12, 24, 32, 61)
        for kind in ("lora", "pissa", "bone", "dora", "miss", "full", "State")
    },
}
HEADER = (
    "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts"
)
OLD_HEADER = "Layer,Mode,Rank,Alpha,Dropout,LISAProb,LoRAProb,LRScale"
EMB = "emb,freeze,0,0,0.01,0.00001,0.000001,0,0.05,0.01,"
HEAD = "head,full,512,32,0.01,0.00001,0.000001,0.1,0.05,0.01,"
LORA = "0,lora,16,32,0.01,1.00E-05,1e-6,0.01,0.05,0.02,"
FULL = '1,full,0,0,0,0.00005,0.00001,0.02,0.05,0.01,"ffn.key, ln2"'
RATES = {"lr_init": 3.0, "lr_final": 2.0, "weight_decay": 0.5}


@pytest.fixture
def profile(tmp_path):
    """Writes lines to a CSV file and reads it as the profile of a two-block model."""

    def write(*lines: str, n_layer: int = 2, prefix: str = "", **more) -> Plan:
        path = tmp_path / "p.csv"
        path.write_bytes((prefix + "\n".join(lines) + "\n").encode())
        return read_profile(str(path), n_layer, **RATES, **more)

    return write


def error(profile, *lines: str, n_layer: int = 2) -> str:
    with pytest.raises(ValueError) as caught:
        profile(*lines, n_layer=n_layer)
    return re.sub(r"^\S*p\.csv", "p.csv", str(caught.value))


def test_todays_header(profile):
    """Numbers in every common spelling, a quoted list of rejected parts, a byte-order mark."""
    plan = profile(HEADER, EMB, LORA, FULL, HEAD, prefix="\ufeff")
    row = plan.rows["0"]
    assert (row.mode, row.rank, row.alpha, row.dropout) == ("lora", 16, 32.0, 0.01)
    assert (row.lr_init, row.lr_final, row.weight_decay) == (1e-5, 1e-6, 0.01)
    assert (row.state_lr_init, row.state_lr_final) == (0.05, 0.02)
    assert plan.rows["1"].reject == ("ffn.key", "ln2")
    assert plan.modes == {"freeze", "lora", "full"}
    assert list(plan.rows) == ["emb", "0", "1", "head"]


def test_small_liberties(profile):
    """Windows line ends, any row order, blank lines, `32.0`, capitals in Mode, cells missing at the end."""
    lora = "0,LoRA,16.0,32.0,,1e-5,1e-6"
    plan = profile(HEADER + "\r", HEAD + "\r", "\r", lora + "\r", FULL + "\r", EMB + "\r", ",,,,\r")
    row = plan.rows["0"]
    assert (row.rank, row.alpha, row.dropout, row.weight_decay, row.reject) == (16, 32.0, 0.0, 0.0, ())
    assert (row.state_lr_init, row.state_lr_final) == (1e-5, 1e-6)


def test_the_older_header_takes_rates_from_the_command_line(profile):
    """Old profiles have no learning rates; LRScale multiplies those of the flags, an empty one is 1."""
    lines = ("emb,freeze,0,0,,1,,1", "0,lora,64,128,0.01,1,,0.5", "1,bone,256,,,,,", "head,freeze,128,64,0.01,1,,1")
    plan = profile(OLD_HEADER, *lines)
    assert (plan.rows["0"].lr_init, plan.rows["0"].lr_final, plan.rows["0"].weight_decay) == (1.5, 1.0, 0.5)
    assert (plan.rows["1"].mode, plan.rows["1"].rank, plan.rows["1"].lr_init) == ("bone", 256, 3.0)


def test_lr_advanced_0(profile):
    """own_rates=False: the flags' learning rates in place of the file's."""
    plan = profile(HEADER, EMB, LORA, FULL, HEAD, own_rates=False)
    assert (plan.rows["0"].lr_init, plan.rows["0"].lr_final, plan.rows["0"].weight_decay) == (3.0, 2.0, 0.5)


def test_wrong_numbers_of_rows(profile):
    """The user reads how many rows there are, how many the model has, and which one is the first wrong one."""
    rows = [f"{i},lora,16,32,0,1e-5,1e-6,0,0,0," for i in range(12)]
    text = error(profile, HEADER, EMB, *rows[:-1], HEAD, n_layer=12)
    assert text == "p.csv has rows for 11 of 12 blocks: row 11 is missing; " + MAKE.format(12)
    text = error(profile, HEADER, EMB, *rows[:3], *rows[5:], HEAD, n_layer=12)
    assert text == "p.csv has rows for 10 of 12 blocks: rows 3, 4 are missing; " + MAKE.format(12)
    text = error(profile, HEADER, EMB, *rows, HEAD, n_layer=10)
    where = "the first is row 10 in line 13"
    assert text == f"p.csv has rows for 12 blocks, the model has 10: 2 too many, {where}; {MAKE.format(10)}"
    assert error(profile, HEADER, LORA, FULL, HEAD) == "p.csv has no row for emb"
    assert error(profile, HEADER, EMB, LORA, FULL) == "p.csv has no row for head"
    assert error(profile, HEADER, EMB, LORA, LORA, FULL, HEAD) == (
        "p.csv:4: column Layer: '0', must be unique (line 3 has it too)"
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    {
        "0,loar,16,32,0,1,1,0,0,0,": f"column Mode: 'loar', must be one of {', '.join(row_modes())}",
        "0,,16,32,0,1,1,0,0,0,": "column Mode: ''",
        "x,lora,16,32,0,1,1,0,0,0,": "column Layer: 'x', must be emb, head, a block from 0 to 1, score_head or",
        "-1,lora,16,32,0,1,1,0,0,0,": "column Layer: '-1'",
        "00,lora,16,32,0,1,1,0,0,0,": "column Layer: '00'",
        "9" * 5000 + ",lora,16,32,0,1,1,0,0,0,": "column Layer: '999",
        "0,lora,0,32,0,1,1,0,0,0,": "column Rank: '0', must be a whole number >= 1",
        "0,bone,-4,32,0,1,1,0,0,0,": "column Rank: '-4', must be a whole number >= 1",
        "0,pissa,1.5,32,0,1,1,0,0,0,": "column Rank: '1.5', must be a whole number >= 1",
        "0,lora,,32,0,1,1,0,0,0,": "column Rank: '', must be a whole number >= 1",
        "0,lora,16,,0,1,1,0,0,0,": "column Alpha: '', must be a number > 0",
        "0,dora,16,0,0,1,1,0,0,0,": "column Alpha: '0', must be a number > 0",
        "0,lora,16,32,1,1,1,0,0,0,": "column Dropout: '1', must be a number from 0 to below 1",
        "0,lora,16,32,0,fast,1,0,0,0,": "column Weight_lr_init: 'fast', must be a number >= 0",
        "0,lora,16,32,0,1,nan,0,0,0,": "column Weight_lr_final: 'nan', must be a number >= 0",
        "0,full,0,0,0,,1,0,0,0,": "column Weight_lr_init: '', must be a number >= 0",
        "0,lora,16,32,0,1,1,-1,0,0,": "column Weight_decay: '-1', must be a number >= 0",
        "0,lora,16,32,0,1,1,0,inf,0,": "column State_lr_init: 'inf', must be a number >= 0",
        "0,lora,16,32,0,1,1,0,0,0,att.key,ffn.key": "12 cells under 11 columns; put quotes around a list",
    }.items(),
)
def test_wrong_cells(profile, row, sentence):
    """File, line, column, value and the legal values."""
    text = error(profile, HEADER, EMB, row, FULL, HEAD)
    assert text.startswith("p.csv:3: ")
    assert sentence in text


def test_ranks_of_freeze_rows_are_not_read(profile):
    """Real profiles hold 0 or nothing there."""
    plan = profile(HEADER, EMB, "0,freeze,,,,,,,,,", "1,freeze,0,0,0,0,0,0,1,0.01,", HEAD)
    assert plan.rows["1"].state_lr_init == 1.0


def test_wrong_files(profile, tmp_path):
    """A wrong header shows the right one; a missing, empty or foreign file is named."""
    assert f"p.csv:1: the header must be {','.join(COLUMNS)}, not Layer,Mode" in error(profile, "Layer,Mode", "0,full")
    assert "p.csv: empty" in error(profile, "")
    with pytest.raises(ValueError, match=r"nowhere\.csv: there is no such file"):
        read_profile(str(tmp_path / "nowhere.csv"), 2, **RATES)
    (tmp_path / "x.csv").write_bytes(b"Layer,Mode\n\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.csv: not UTF-8 text"):
        read_profile(str(tmp_path / "x.csv"), 2, **RATES)


def test_rows_of_tensors(profile):
    """ln0 follows emb, ln_out follows head; block 1 is not block 10."""
    plan = make_plan("lora", 12, lr_init=1.0, lr_final=1.0)
    found = {name: plan.row_of(name).layer for name in ("emb.weight", "blocks.0.ln0.bias", "blocks.0.ln1.weight")}
    assert found == {"emb.weight": "emb", "blocks.0.ln0.bias": "emb", "blocks.0.ln1.weight": "0"}
    assert plan.row_of("blocks.10.att.key.weight").layer == "10"
    assert plan.row_of("blocks.1.att.key.lora_A").layer == "1"
    assert plan.row_of("ln_out.weight").layer == plan.row_of("head.weight").layer == "head"


V7_SMALL = ("att.x_r", "att.w0", "att.a2", "att.v1", "att.g2", "att.k_k", "att.k_a", "att.r_k", "ffn.x_k")


def test_what_trains(profile):
    """`full` rows: all; `freeze`: nothing but states; adapters: the small tensors too, unless limited."""
    freeze = "0,freeze,0,0,0,0,0,0,1,0.1,"
    plan = profile(HEADER, EMB, freeze, FULL, HEAD)
    assert plan.trains("blocks.1.att.key.weight", "x070", True)
    assert plan.trains("head.weight", "x070", True) and plan.trains("ln_out.bias", "x070", True)
    assert not plan.trains("blocks.1.ffn.key.weight", "x070", False), "RejectParts"
    assert not plan.trains("blocks.1.ln2.weight", "x070", False), "RejectParts"
    for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.att.key.weight", "blocks.0.ln1.weight"):
        assert not plan.trains(name, "x070", False)
    assert not plan.trains("blocks.0.att.time_state", "x070", True), "a state that the file has, without --state 1"
    tuned = dataclasses.replace(plan, states=("att.time_state",))
    assert tuned.trains("blocks.0.att.time_state", "x070", True) and tuned.trains(
        "blocks.1.att.time_state", "x070", True
    )
    assert not tuned.trains("blocks.0.att.shift_state", "x070", True)

    plan = profile(HEADER, EMB, LORA, FULL, "head,lora,8,8,0,1,1,0,0,0,")
    small = ["ln1.weight", "ln2.bias", "att.ln_x.weight", *V7_SMALL]
    assert all(plan.trains(f"blocks.0.{name}", "x070", False) for name in small)
    assert not any(plan.trains(f"blocks.0.{name}", "x070", True) for name in small)
    assert not plan.trains("blocks.0.att.key.weight", "x070", False)
    assert plan.trains("ln_out.weight", "x070", False) and not plan.trains("head.weight", "x070", False)
    for name in ("att.time_decay", "att.time_maa_w1", "ffn.time_mix_k"):
        assert plan.trains(f"blocks.0.{name}", "x060", False)


GATED = {"ffn.key", "ffn.receptance", "ffn.value"}
ADAPTED = {
    "x040": {"att.key", "att.value", "att.receptance", "att.output"} | GATED,
    "x050": {"att.key", "att.value", "att.receptance", "att.output"} | GATED,
    "x051": {"att.key", "att.value", "att.receptance", "att.output", "att.gate"} | GATED,
    "x052": {"att.key", "att.value", "att.receptance", "att.output", "att.gate"} | GATED,
    "x060": {"att.key", "att.value", "att.receptance", "att.output", "att.gate"} | GATED,
    "x070": {"att.key", "att.value", "att.receptance", "att.output", "ffn.key", "ffn.value"},
    "x070a": {"att.key", "att.value", "att.receptance", "att.output", "ffn.key", "ffn.value", "ffn.s_emb_x"},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_lora_does_with_each_tensor_of_each_version(version):
    """A tensor that no rule knows would stay frozen, or decay, without a word."""
    plan = make_plan("lora", 2, rank=4, alpha=4.0, lr_init=1.0, lr_final=1.0, weight_decay=0.5)
    sizes = sizes_of(random_tensors(version, 2))
    with torch.device("meta"):
        model = RWKV(sizes)
    prefix = "blocks.1."
    matrices = {name.removeprefix(prefix) for name in plan_layout(model, plan).adapted if name.startswith(prefix)}
    assert matrices == ADAPTED[version]
    for name, _ in model.named_parameters():
        last = name.removeprefix(prefix).removesuffix(".weight")
        if name.endswith(".ffn.s_emb.weight"):
            assert not plan.trains(name, version, False) and plan.group(name, version, True)[2] == 0.0
            continue
        if name.startswith(prefix):
            assert plan.trains(name, version, False) != (last in matrices), name
            assert not plan.trains(name, version, True)
        is_matrix = re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight") in matrices | {"emb", "head"}
        assert plan.group(name, version, True)[2] == (0.5 if is_matrix else 0.0), name


def test_tables_by_token_train_where_they_are_asked_for(profile):
    """If this breaks, DeepEmbed's tables, most of a model, train unasked or beside rows that are frozen, or decay."""
    lines = [HEADER, "emb,full,0,0,0,1,1,0,0,0,", LORA, "1,freeze,0,0,0,1,1,0,0,0,", HEAD]
    table = "blocks.{}.ffn.s_emb.weight".format
    plan = dataclasses.replace(profile(*lines), tables=True)
    assert plan.trains(table(0), "x070a", limited=True) and not plan.trains(table(1), "x070a", False)
    assert plan.adapts("blocks.0.ffn.s_emb") is None
    assert plan.group(table(0), "x070a", True) == plan.group("blocks.0.ln1.weight", "x070a", True)
    for parts, learns in (("att,ln", False), ("ffn", True)):
        some = make_plan("lora", 2, parts=parts, lr_init=1.0, lr_final=1.0)
        assert dataclasses.replace(some, tables=True).trains(table(0), "x070a", False) is learns
        assert not some.trains(table(0), "x070a", False)
    rejecting = profile(HEADER, lines[1], '0,full,0,0,0,1,1,0,0,0,"s_emb."', lines[3], HEAD)
    assert not dataclasses.replace(rejecting, tables=True).trains(table(0), "x070a", False)


@pytest.mark.parametrize("version", VERSIONS)
def test_multipliers_reach_the_tensors_of_each_version(version):
    """time_decay (w0 in x070) learns twice, time_first three times as fast; a misspelt name would learn as the rest."""
    plan = make_plan("full", 2, lr_init=1.0, lr_final=1.0)
    rates = {name.split(".")[-1]: plan.group(name, version, True)[0] for name in random_tensors(version, 2)}
    faster = {name: rate for name, rate in rates.items() if rate != 1.0}
    expected = {"x040": {"time_decay": 2.0, "time_first": 3.0}, "x070": {"w0": 2.0}, "x070a": {"w0": 2.0}}
    assert faster == expected.get(version, {"time_decay": 2.0})


def test_what_is_adapted(profile):
    """Every matrix of an adapter row except rejected ones; emb and head too."""
    reject = '1,lora,16,32,0,1,1,0,0,0,"att.receptance,ffn"'
    plan = profile(HEADER, "emb,lora,4,4,0,1,1,0,0,0,", LORA, reject, HEAD)
    assert plan.adapts("emb").rank == 4
    assert plan.adapts("head") is None
    assert plan.adapts("blocks.0.att.key").rank == 16
    assert plan.adapts("blocks.1.att.key").rank == 16
    assert plan.adapts("blocks.1.att.receptance") is None
    assert plan.adapts("blocks.1.ffn.value") is None


def test_optimizer_groups(profile):
    """Learning rates by row; states have their own; only matrices decay; multipliers of the tradition."""
    plan = profile(HEADER, EMB, LORA, FULL, HEAD)
    assert plan.group("blocks.0.att.key.lora_A", "x070", True) == (1e-5, 1e-6, 0.01)
    assert plan.group("blocks.1.att.key.weight", "x070", True) == (5e-5, 1e-5, 0.02)
    assert plan.group("head.weight", "x070", True) == (1e-5, 1e-6, 0.1)
    assert plan.group("ln_out.weight", "x070", True) == (1e-5, 1e-6, 0.0)
    assert plan.group("blocks.0.att.ln_x.weight", "x070", True)[2] == 0.0
    assert plan.group("blocks.0.att.time_state", "x070", True) == (0.05, 0.02, 0.0)
    cases = {("x070", "w0"): 2, ("x070", "w1"): 1, ("x060", "time_decay"): 2, ("x060", "time_decay_w1"): 1}
    cases |= {("x040", "time_first"): 3, ("x040", "time_decay"): 2, ("x052", "time_decay"): 2}
    for (version, last), times in cases.items():
        assert plan.group(f"blocks.1.att.{last}", version, True) == (times * 5e-5, times * 1e-5, 0.0)
        assert plan.group(f"blocks.1.att.{last}", version, False) == (5e-5, 1e-5, 0.0)


def test_plans_from_flags():
    """--peft lora leaves emb and head frozen; --peft full trains all, which training from zero needs."""
    plan = make_plan("full", 2, lr_init=1.0, lr_final=0.5)
    assert {row.mode for row in plan.rows.values()} == {"full"}
    plan = make_plan("lora", 4, rank=16, alpha=32, layers="0 2-3", parts="att,ln", lr_init=1.0, lr_final=0.5)
    assert [row.mode for row in plan.rows.values()] == ["freeze", "lora", "freeze", "lora", "lora", "freeze"]
    assert plan.adapts("blocks.0.att.key") and not plan.adapts("blocks.0.ffn.key")
    assert plan.trains("blocks.0.ln1.weight", "x040", False)
    assert not plan.trains("blocks.0.att.time_mix_k", "x040", False)
    plan = make_plan("state", 2, lr_init=1.0, lr_final=0.01)
    assert plan.modes == {"freeze"}
    assert plan.group("blocks.1.att.time_state", "x070", True) == (1.0, 0.01, 0.0)


def test_block_ranges():
    """`0-3 25-31` and its mistakes."""
    assert parse_layers("0-1, 3", 4) == {0, 1, 3}
    assert parse_layers("", 3) == {0, 1, 2}
    for text in ("0-4", "2-1", "a", "0--1", "4"):
        with pytest.raises(ValueError, match=re.escape(f"{{lora_layers}} {text}: ")):
            parse_layers(text, 4)


def test_the_plan_of_a_config(profile, tmp_path):
    """The settings reach the plan, with and without a profile."""
    config = Config(peft="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.1, lr_init=0.5, lora_parts="ffn")
    plan = plan_for(config, 3)
    row = plan.rows["2"]
    assert (row.rank, row.alpha, row.dropout, row.lr_init, plan.parts) == (4, 8.0, 0.1, 0.5, {"ffn"})
    profile(HEADER, EMB, LORA, FULL, HEAD)
    path = str(tmp_path / "p.csv")
    assert plan_for(Config(layer_profile=path), 2).rows["0"].lr_init == 1e-5
    assert plan_for(Config(layer_profile=path, lr_advanced=False, lr_init=0.5), 2).rows["0"].lr_init == 0.5


@pytest.mark.parametrize("path", sorted((ROOT / "layerprofile").glob("*.csv")), ids=lambda path: path.name)
def test_shipped_profiles(path):
    """Each profile in layerprofile/ fits the number of blocks in its name."""
    n_layer = int(path.name.split("_")[0])
    plan = read_profile(str(path), n_layer, **RATES)
    assert len(plan.rows) == n_layer + 2


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_what_the_command_writes(name, capsys):
    """If this breaks, a user who writes a profile gets another one than the page describes."""
    write_profile(SHIPPED[name].split())
    text = capsys.readouterr().out
    assert text == (ROOT / "layerprofile" / f"{name}.csv").read_text()


def test_a_written_profile_is_read_back(tmp_path, script):
    """Ranks double towards the head, the ends and RejectParts are as asked, and what is impossible is one sentence."""
    path = tmp_path / "p.csv"
    words = "--make dora --layers 6 --rank 8 --top_rank 32 --alpha 8 --lr_init 1e-5 --emb pissa --head bone"
    write_profile([*words.split(), "--reject", "att.key, ln", "--output", str(path)])
    plan = read_profile(str(path), 6, **RATES)
    assert [plan.rows[str(i)].rank for i in range(6)] == [8, 8, 16, 16, 32, 32]
    assert {row.alpha / row.rank for name, row in plan.rows.items() if name.isdigit()} == {1.0}
    assert plan.rows["3"].reject == ("att.key", "ln") and plan.rows["3"].lr_final == pytest.approx(1e-6)
    assert (plan.rows["emb"].mode, plan.rows["head"].mode) == ("pissa", "bone")
    for words in (
        "--make lora --layers 6 --top_rank 20",
        "--make lora --layers 0",
        "--make lora",
        "--make x --layers 1",
        "--make lora --layers 1 --dropout 1",
        "--make lora --layers 1 --lr_init nan",
        "--make lora --layers 1 --lr_init 1e-4 --lr_final -1",
        "--make lora --layers 1 --weight_decay -1",
        "--make lora --layers 1 --alpha inf",
    ):
        status, out, err = script(write_profile, *words.split())
        assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, (words, err)


HEAD_ROWS = {
    "full": ("value_head,full,0,0,0,0.01,0.001,0.1,0,0,", {"value_head.weight"}),
    "lora": ("value_head,lora,4,8,0,0.01,0.001,0.1,0,0,", {"value_head.lora_A", "value_head.lora_B"}),
    "none": ("", {"value_head.weight"}),
}


@pytest.mark.parametrize("kind", HEAD_ROWS)
def test_a_row_of_its_own_for_the_value_head(tmp_path, kind):
    """If this breaks, the value head cannot learn at another rate than the policy, and a profile that names it is
    refused, or names it in vain."""
    row, trains = HEAD_ROWS[kind]
    path = tmp_path / "profile.csv"
    path.write_text(
        (ROOT / "layerprofile" / "2_TEST.csv").read_text() + row + "\nscore_head,full,0,0,0,0.5,0.5,0,0,0,\n"
    )
    config = Config(loss="ppo", layer_profile=str(path), lr_init=3e-4, lr_final=1e-5)
    plan = plan_for(config, 2)
    model, _ = build_model(random_tensors(n_layer=2), BuildOptions(torch.float32, plan=plan, quant="nf4"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "_head" in name}
    assert learning == trains and list(plan.rows)[-1] == "value_head" and "score_head" not in plan.rows
    want = (0.01, 0.001, 0.1) if row else (3e-4, 1e-5, 0.0)
    assert plan.group(next(iter(trains)), "x070", True) == want
    assert plan_for(Config(loss="dpo", layer_profile=str(path)), 2).rows.keys() == {"emb", "0", "1", "head"}


def test_a_head_that_was_never_trained_is_not_frozen(tmp_path):
    """It would say 0 of everything, and nothing would reach what is below it."""
    path = tmp_path / "profile.csv"
    path.write_text((ROOT / "layerprofile" / "2_TEST.csv").read_text() + "score_head,freeze,0,0,0,0,0,0,0,0,\n")
    plan = plan_for(Config(loss="rm", layer_profile=str(path)), 2)
    with pytest.raises(ValueError, match=r"profile.csv:6: column Mode: 'freeze', but .* has no score_head.weight"):
        build_model(random_tensors(n_layer=2), BuildOptions(torch.float32, plan=plan))
    model, _ = build_model(random_tensors(n_layer=2, heads="score_head"), BuildOptions(torch.float32, plan=plan))
    assert not model.score_head.weight.requires_grad
