"""A tiny model with a vocabulary of single bytes, so that whole runs take a second."""

import csv
import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, whose library is compiled for it

from rwkv_rlhf.reports import curves as drawing
from rwkv_rlhf.settings.command_line import run as run_script
from tests.support.files import VOCAB
from tests.support.models import any_initial_tensors


def pytest_collection_modifyitems(config, items):
    """Tests of a GPU are not chosen where there is none; pytest counts them as deselected."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _seed():
    """A test draws the same numbers whichever ran before it."""
    torch.manual_seed(0)


DRAW_CURVES = drawing.draw_curves


@pytest.fixture(scope="session", autouse=True)
def _short_reports():
    """Drawing, and answers of models that never learnt to stop, take longer than these runs to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "draw_curves", lambda folder: None)
        patch.setattr("rwkv_rlhf.training.fixed_prompts.MOST_TOKENS", 4)
        yield


@pytest.fixture
def curves(monkeypatch):
    """Where a test is about the curves, they are drawn."""
    monkeypatch.setattr(drawing, "draw_curves", DRAW_CURVES)


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory):
    """A trie vocabulary of the 256 single bytes."""
    path = tmp_path_factory.mktemp("vocab") / "bytes.txt"
    path.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    return path


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """base_of(version): the file of a two-layer model in which no tensor is zero."""
    folder = tmp_path_factory.mktemp("base")

    def base(version):
        path = folder / f"{version}.pth"
        if not path.exists():
            tensors = any_initial_tensors(version, 2, 64, VOCAB, 32, 7)
            generator = torch.Generator().manual_seed(7)
            for name, value in tensors.items():
                scale = 0.3 if name == "emb.weight" else 0.02
                tensors[name] = value + scale * torch.randn(value.shape, generator=generator)
            torch.save(tensors, path)
        return path

    return base


@pytest.fixture(scope="session")
def base_model(base_of):
    """The file of a two-layer RWKV-7 in which no tensor is zero."""
    return base_of("x070")


@pytest.fixture(scope="session")
def pairs_csv(tmp_path_factory):
    """24 preference pairs of different lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "reject"])
        for n in range(24):
            writer.writerow([f"say {n}" + "!" * (n % 5), f"gladly: {n}" + " ok" * (n % 3), f"no {n}" + "?" * (n % 4)])
    return path


@pytest.fixture(scope="session")
def text_jsonl(tmp_path_factory):
    """40 short documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"line {n}: " + "abc " * (1 + n % 6)}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def script(capsys):
    """script(main, *words) -> (exit status, stdout, stderr), as a person would see them."""

    def call(main, *words):
        with pytest.raises(SystemExit) as done:
            run_script(main, [str(word) for word in words])
        out, err = capsys.readouterr()
        return done.value.code, out, err

    return call
