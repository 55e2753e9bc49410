"""Damaged and hostile files that the fuzz suite found: each once did something else than end in one sentence."""

import json
import os
import struct
import warnings
import zipfile
from random import Random

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from rwkv_rlhf.checkpoints.exporters.peft import from_peft
from rwkv_rlhf.checkpoints.sidecar import read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.data.arrow_rows import read_parquet
from rwkv_rlhf.data.batch import TextExample
from rwkv_rlhf.data.json_rows import read_jsonl
from rwkv_rlhf.data.opening import open_text
from rwkv_rlhf.data.pairs.h5 import read_pair_h5
from rwkv_rlhf.data.pairs.save import read_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.text.h5 import H5File, writing
from rwkv_rlhf.files import check_archive
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.scoring.kept_scores import KeptScores
from rwkv_rlhf.settings.command_line import one_line
from tests.fuzzing import readers, samples


def refused(call, *said):
    with pytest.raises(ValueError) as caught:
        call()
    for part in said:
        assert str(part) in str(caught.value), caught.value


def test_a_compressed_record_is_not_unfolded(tmp_path):
    """A checkpoint of kilobytes could become gigabytes in memory."""
    torch.save([([1], [2], [3], 0.5, 0.5)], tmp_path / "whole.save")
    with zipfile.ZipFile(tmp_path / "whole.save") as old, zipfile.ZipFile(tmp_path / "a.save", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(50 << 20 if name.endswith("pkl") else 0))
    assert (tmp_path / "a.save").stat().st_size < 1 << 20
    refused(lambda: read_save(tmp_path / "a.save", DataReport("")), tmp_path / "a.save", "compressed")
    os.rename(tmp_path / "a.save", tmp_path / "a.pth")
    refused(lambda: read_tensors(tmp_path / "a.pth"), tmp_path / "a.pth", "compressed")


@pytest.mark.parametrize("lie", ["disks", "name", "storage"])
def test_lies_in_an_archive(tmp_path, lie):
    """Python's zipfile and torch raise errors of many kinds."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    end = data.rindex(b"PK\x05\x06")
    if lie == "disks":
        data[end:end] = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 2)
    elif lie == "name":
        entry = data.index(b"PK\x01\x02")
        data[entry + 9], data[entry + 46] = data[entry + 9] | 8, 0xFF
    else:
        torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        data = bytearray((tmp_path / "a.pth").read_bytes())
        key = data.rindex(b"]q") if b"]q" in data else len(data) - 40
        data[key + 8 : key + 10] = b"99"
    (tmp_path / "a.pth").write_bytes(data)
    refused(lambda: read_tensors(tmp_path / "a.pth"), tmp_path / "a.pth")
    (tmp_path / "text.pth").write_bytes(b"words")
    assert not check_archive(tmp_path / "text.pth")


def test_tensors_that_are_more_than_the_file(tmp_path):
    """A stride of 0 makes a terabyte of four bytes; sparse, quantised and complex tensors are no weights."""
    plain = torch.zeros(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)
    odd = {"sparse": plain.to_sparse(), "complex": plain.cfloat(), "packed": packed, "meta": plain.to("meta")}
    odd["wide"] = torch.zeros(()).expand(1 << 20, 1 << 20)
    for name, tensor in odd.items():
        torch.save({"emb.weight": tensor}, tmp_path / f"{name}.pth")
        said = "describes tensors" if name == "wide" else "no plain tensor"
        refused(lambda name=name: read_tensors(tmp_path / f"{name}.pth"), tmp_path / f"{name}.pth", said)


def test_a_layer_of_a_huge_number():
    """Gaps were looked for by counting up to the largest number."""
    tensors = samples.base_tensors()
    tensors["blocks.999999999999.att.r_k"] = tensors["blocks.0.att.r_k"]
    refused(lambda: sizes_of(tensors), "no layer 1")


def test_a_list_that_is_used_many_times(tmp_path):
    """A pickle may name one list of ids a thousand times; copies of it would be a thousand times the file."""
    ids = list(range(2000))
    torch.save([(ids, ids, [n], 0.5, 0.5) for n in range(300)], tmp_path / "a.save")
    pairs = read_save(tmp_path / "a.save", DataReport(""), 3000)
    assert len({id(pair.prompt) for pair in pairs}) == 1


def write_h5(folder):
    with writing(folder / "a.h5", {}) as file:
        file.add([TextExample(np.arange(1, n)) for n in (4, 9)])
    data = bytearray((folder / "a.h5").read_bytes())
    return data, data.index(b"GCOL")


def test_a_heap_that_leads_back_to_itself(tmp_path):
    """HDF5 follows objects of size 0 for ever, in C, where not even Ctrl+C is heard."""
    data, heap = write_h5(tmp_path)
    data[heap + 16 : heap + 4096] = bytes(4080)
    (tmp_path / "a.h5").write_bytes(data)
    refused(lambda: H5File(tmp_path / "a.h5"), tmp_path / "a.h5", "heap")


def test_text_beside_the_lists_is_not_read(tmp_path):
    """It lies in a heap too, of which only those of the lists are looked at; a chain of it may lead back to itself."""
    with writing(tmp_path / "a.h5", {"vocab_size": 9, "tokenizer": "words"}) as file:
        file.add([TextExample(np.arange(1, n)) for n in (4, 9)])
    data = (tmp_path / "a.h5").read_bytes()
    heaps = [at for at in range(len(data)) if data.startswith(b"GCOL", at)]
    text = next(at for at in heaps if b"words" in data[at : at + 4096])
    damaged = bytearray(data)
    damaged[text + 16 : text + 4096] = bytes(4080)
    (tmp_path / "b.h5").write_bytes(damaged)
    assert H5File(tmp_path / "a.h5").about == {"vocab_size": 9}
    if len(heaps) > 1:
        assert H5File(tmp_path / "b.h5").about == {"vocab_size": 9}
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["top_k"] = "many"
    assert H5File(tmp_path / "a.h5").about["top_k"] == "no number"


def test_an_entry_that_claims_too_much(tmp_path):
    """HDF5 makes room for what an entry claims before it looks whether it is there."""
    data, heap = write_h5(tmp_path)
    entry = data.index(struct.pack("<IQ", 3, heap))
    data[entry : entry + 4] = struct.pack("<I", 1 << 31)
    (tmp_path / "a.h5").write_bytes(data)
    refused(lambda: H5File(tmp_path / "a.h5"), tmp_path / "a.h5", "claim more bytes")


@pytest.mark.parametrize("filters", [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}])
def test_the_look_into_an_h5_sees_through_filters(tmp_path, filters):
    """If this breaks, files that were compressed are refused, or read without a look."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        column = file.create_dataset("tokens", (70,), h5py.vlen_dtype(np.int64), chunks=(16,), **filters)
        for at in range(70):
            column[at] = np.arange(1, 3 + at)
    assert len(open_text(path, samples.Words())) == 70
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    data[heap : heap + 4] = b"gone"
    path.write_bytes(data)
    refused(lambda: H5File(path), path, "heap")


def test_lists_that_are_none(tmp_path):
    """Groups, links to other files, tables of petabytes and numbers where lists of tokens should be."""
    kind = h5py.vlen_dtype(np.int64)
    made = {
        "group": lambda file: file.create_group("tokens"),
        "link": lambda file: file.__setitem__("tokens", h5py.ExternalLink("b.h5", "/tokens")),
        "table": lambda file: file.create_dataset("tokens", (1 << 40,), kind, chunks=(64,)),
        "square": lambda file: file.create_dataset("tokens", (2, 2), kind),
        "numbers": lambda file: file.create_dataset("tokens", data=np.arange(4)),
    }
    for name, make in made.items():
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        refused(lambda path=path: H5File(path), path, "tokens")
    with h5py.File(tmp_path / "pairs.h5", "w") as file:
        for column in ("prompttokens", "chosentokens", "rejecttokens"):
            file.create_dataset(column, (1,), kind)
        file.create_dataset("chosenprob", (1 << 40,), "f4", chunks=(1024,))
    refused(lambda: read_pair_h5(tmp_path / "pairs.h5", DataReport("")), "pairs.h5", "chosenprob")


def test_a_parquet_value_that_python_has_no_form_for(tmp_path):
    """A date in the year five million."""
    table = pyarrow.table({"prompt": pyarrow.array([2**31 - 1], type=pyarrow.date32()), "chosen": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(lambda: list(read_parquet(tmp_path / "a.parquet", DataReport(""))), tmp_path / "a.parquet")


def test_a_number_of_5000_digits(tmp_path):
    """Python refuses to read it, with an error of another kind than for other bad JSON."""
    (tmp_path / "a.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    refused(lambda: list(read_jsonl(tmp_path / "a.jsonl", DataReport(""))), f"{tmp_path / 'a.jsonl'}:1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapted", {"a": {"mode": "lora", "rank": 0, "alpha": 1, "scaling": 1}}),
        ("adapted", {"a": {"mode": "lora", "rank": 1, "alpha": float("nan"), "scaling": 1}}),
        ("quant_mode", ["nf4"]),
        ("plan", 5),
        ("format", "new"),
    ],
)
def test_a_sidecar_of_other_kinds(tmp_path, key, value):
    """Values of the wrong kind were met in the middle of a merge."""
    path = samples.write_adapter(tmp_path)
    side = path.with_suffix(".json")
    side.write_text(json.dumps(json.loads(side.read_text()) | {key: value}))
    refused(lambda: read_sidecar(path), side)
    side.write_text("[" * 100_000)
    refused(lambda: read_sidecar(path), side, "nested too deeply")


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_alpha": None},
        {"lora_alpha": {}},
        {"lora_dropout": "much"},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"a": "x"}},
        {"alpha_pattern": {"(a+)+": 1.0}},
    ],
)
def test_a_peft_configuration_of_other_kinds(changed):
    """An expression that takes for ever on a layer's name, and values that are no numbers."""
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 2} | changed
    tensors = {"base_model.model.blocks.0.att.key.lora_A.weight": torch.zeros(2, 4)}
    refused(lambda: from_peft(tensors, config), "adapter_config.json")


def test_a_file_of_something_else_is_not_cut(tmp_path):
    """The output of reject sampling was shortened to its last whole row before anyone looked what it was."""
    path = tmp_path / "out.csv"
    path.write_bytes(b'my,diary\n1,2\n3,"open')
    refused(lambda: RejectFile(path, ["prompt", "chosen", "reject"]).resume([{}], False), path)
    assert path.read_bytes() == b'my,diary\n1,2\n3,"open'


@pytest.mark.parametrize("line", [b"[[1.0,", b"[" * 5000, b"[[-1.0]]", b"[[NaN, -1.0]]", b"[]", b'{"a": 1}'])
def test_damaged_reference_scores_are_scored_again(tmp_path, line):
    """With everything behind them; what stands before is kept."""
    path = tmp_path / "scores.part"
    path.write_bytes(b"key\n[[-1.0, -2.5]]\n" + line + b"\n[[-1.0, -2.0]]\n")
    assert KeptScores(path, "key").finished([1, 1, 1]) == [[[-1.0, -2.5]]]
    assert path.read_bytes() == b"key\n[[-1.0, -2.5]]\n"


def test_a_vocabulary_that_lacks_its_own_unknown_word(tmp_path):
    """The package raises a bare Exception when it first meets a letter that it does not know."""
    path = samples.write_tokenizer(tmp_path)
    path.write_text(path.read_text().replace('"unk_token":"<unk>"', '"unk_token":"<gone>"').replace("<unk>", "<other>"))
    content = json.loads(path.read_text())
    content["model"]["unk_token"] = "<gone>"
    path.write_text(json.dumps(content))
    refused(lambda: readers.read_vocabulary(path, Random(0)), "tokenizer.json")


def test_a_vocabulary_over_which_its_package_panics(tmp_path):
    """A merge without its letters; the panic is no Exception, and nobody catches it."""
    path = samples.write_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    content["model"] |= {"continuing_subword_prefix": "xxxxxxx"}
    path.write_text(json.dumps(content))
    refused(lambda: readers.read_vocabulary(path, Random(0)), path, "not a tokenizer.json")


def test_a_sentence_stays_one(capsys):
    """A file's own text in a message must not clear the terminal, colour it, or fill it."""
    assert one_line("a\n b\x1b[2J\u202ec") == "a b\\x1b[2J\\u202ec"
    assert len(one_line("x" * 10**6)) < 1100
