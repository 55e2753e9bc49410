"""A tiny model with a vocabulary of single bytes, so that whole runs take a second."""

import csv
import json

import pytest
import torch

from rwkv_rlhf.settings.command_line import run as run_script
from tests.support.models import any_initial_tensors

VOCAB = 257  # id 0 ends a document, id b + 1 is the byte b


def random_tensors(version="x070", n_layer=3, n_embd=64, vocab_size=300, head_size=32, seed=1):
    """A checkpoint in which no tensor is zero, so that every path of the model shows in the logits."""
    tensors = any_initial_tensors(version, n_layer, n_embd, vocab_size, head_size, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator)
        if name == "emb.weight":
            tensors[name] = noise
        elif name == "head.weight":
            tensors[name] = noise / n_embd**0.5
        elif value.dim() == 2 and "r_k" not in name:
            tensors[name] = value + noise * 0.5 / max(value.shape) ** 0.5
        else:
            tensors[name] = value + noise * 0.1
    return tensors


@pytest.fixture(autouse=True)
def _seed():
    """A test draws the same numbers whichever ran before it."""
    torch.manual_seed(0)


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


def read_jsonl(path, event=None):
    """Objects of a JSON lines file, of one event if given."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if event is None or r.get("event") == event]
