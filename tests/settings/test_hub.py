"""Names of the Hub: what they bring here, asked of a server on this machine that speaks the Hub's API."""

import json

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import constants, file_download, hf_api  # noqa: E402

from rwkv_rlhf.commands import train  # noqa: E402
from rwkv_rlhf.commands.convert import main as convert  # noqa: E402
from rwkv_rlhf.settings.command_line import parse  # noqa: E402
from rwkv_rlhf.settings.config_file import config_text  # noqa: E402
from rwkv_rlhf.settings.hub import local, local_words, named_again, parse_name, with_local_files  # noqa: E402
from tests.support.hub import COMMIT, Hub, serving  # noqa: E402

MODEL = bytes(range(256)) * 20
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a model and some data, an empty cache, no token."""
    hub = Hub(
        {
            "org/model": {"m.pth": MODEL, "m.json": b"{}", "other.pth": b"x", "README.md": b"read"},
            "org/one": {"a.pth": MODEL, "config.json": b"{}"},
            "org/shards": {
                "model.safetensors.index.json": b'{"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}}',
                "s-1.safetensors": MODEL,
                "s-2.safetensors": MODEL[::-1],
            },
            "datasets/org/data": {
                "README.md": b"",
                "dataset_info.json": b"{}",
                "data/train-00000-of-00002.jsonl": ROW,
                "data/train-00001-of-00002.jsonl": ROW * 2,
                "data/validation.jsonl": ROW * 3,
            },
            "datasets/org/plain": {"rows.jsonl": ROW},
            "datasets/org/two": {"en/train.jsonl": ROW, "fr/train.jsonl": ROW},
            "datasets/org/none": {"script.py": b""},
        }
    )
    with serving(hub) as address, monkeypatch.context() as patch:
        for module in (constants, file_download, hf_api):
            patch.setattr(module, "ENDPOINT", address, raising=False)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        patch.setattr(file_download.time, "sleep", lambda seconds: None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        hub.patch, hub.address = patch, address
        yield hub


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_a_model_comes_once_and_with_its_sidecar(hub):
    """If this breaks, gigabytes are fetched at every start, or a checkpoint comes without what explains it."""
    path = local("hf://org/model/m.pth")
    assert read(path) == MODEL and read(path.replace("m.pth", "m.json")) == b"{}" and COMMIT in path
    fetched = [one for one in hub.asked if one[0] == "GET" and "/resolve/" in one[1]]
    assert local("hf://org/model/m.pth") == path
    assert [one for one in hub.asked if one[0] == "GET" and "/resolve/" in one[1]] == fetched
    assert local(f"hf://org/model@{COMMIT}/m.pth") == path and read(local("hf://org/one")) == MODEL


def test_shards_come_with_their_index(hub):
    """If this breaks, a model in several files is an index of what is not there."""
    path = local("hf://org/shards")
    assert read(path.replace("model.safetensors.index.json", "s-2.safetensors")) == MODEL[::-1]
    assert read(path.replace("model.safetensors.index.json", "s-1.safetensors")) == MODEL


def test_data_by_split_and_weight(hub):
    """If this breaks, a run trains on what it should be judged by, or on a description of the data."""
    files = local("hf://datasets/org/data:train:2").split(",")
    assert [read(path.removesuffix(":2")) for path in files] == [ROW, ROW * 2] and all(":2" in path for path in files)
    assert local("hf://datasets/org/data") == ",".join(path.removesuffix(":2") for path in files)
    for split in ("validation", "valid"):
        assert read(local(f"hf://datasets/org/data:{split}")) == ROW * 3
    assert read(local("hf://datasets/org/plain")) == read(local("hf://datasets/org/plain/rows.jsonl")) == ROW
    assert read(local("hf://datasets/org/two/fr:train")) == ROW
    mixed = local("mine.csv,hf://datasets/org/plain:0.5")
    assert mixed.startswith("mine.csv,") and mixed.endswith("rows.jsonl:0.5")


def test_a_download_that_was_cut_off_goes_on(hub):
    """If this breaks, a lost connection costs all that had come."""

    def killed(seconds):
        raise KeyboardInterrupt

    hub.patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # what the library writes at once
    hub.cut["m.pth"] = 1500
    hub.patch.setattr(file_download.time, "sleep", killed)  # where the library waits before it tries again by itself
    with pytest.raises(KeyboardInterrupt):
        local("hf://org/model/m.pth")
    hub.cut.clear()
    hub.asked.clear()
    assert read(local("hf://org/model/m.pth")) == MODEL
    (part,) = (one[2] for one in hub.asked if one[0] == "GET" and one[1].endswith("m.pth"))
    assert part == "bytes=1024-"


@pytest.mark.parametrize("name", ["hf://org/model/m.pth", "hf://datasets/org/plain"])
def test_a_damaged_file_does_not_count(hub, name):
    """If this breaks, a model trains from bytes that are not the Hub's, and the cache keeps them."""
    hub.damaged |= {"m.pth", "rows.jsonl"}
    with pytest.raises(ValueError, match="arrived damaged"):
        local(name)
    hub.damaged.clear()
    assert read(local(name)) in (MODEL, ROW)


def test_without_a_connection_the_cache_serves(hub, tmp_path, monkeypatch):
    """If this breaks, a run cannot be repeated on a train."""
    names = ["hf://org/model/m.pth", "hf://datasets/org/data:train", "hf://org/one"]
    found = [local(name) for name in names]
    for module in (constants, file_download, hf_api):
        monkeypatch.setattr(module, "ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert [local(name) for name in names] == found
    with pytest.raises(ValueError, match=r"cannot be had from .*not in the cache"):
        local("hf://org/shards")


def test_a_gated_model_needs_a_token(hub):
    """If this breaks, who has no access reads a traceback, or a token goes unused."""
    hub.gated.add("org/model")
    with pytest.raises(ValueError, match=r"org/model is gated: accept its conditions at http://.*hf auth login"):
        local("hf://org/model/m.pth")
    hub.patch.setenv("HF_TOKEN", "good")
    assert read(local("hf://org/model/m.pth")) == MODEL
    assert {one[3] for one in hub.asked if one[0] == "GET"} == {"", "good"}


WRONG = {
    "hf://org/model": "name one file of org/model; it has m.pth, other.pth",
    "hf://org/model/n.pth": "org/model has no file n.pth; it has README.md, m.json, m.pth, other.pth",
    "hf://org/nothing/m.pth": "there is no repository org/nothing, or it is private",
    "hf://org/model@v9/m.pth": "org/model has no revision v9",
    "hf://model.pth": "expected hf://ORG/REPO/FILE",
    "hf://org/model/m.pth:train": "expected hf://ORG/REPO/FILE",
    "hf://datasets/org/data:test": "no file of the split test; splits: train, validation; it has data/train-00000",
    "hf://datasets/org/two": "several sets are there; name a folder or a file behind it; it has en/train.jsonl",
    "hf://datasets/org/none": "no file of data is there that can be read; it has script.py",
    "hf://datasets/org/nothing": "there is no repository datasets/org/nothing",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there_is_a_sentence(hub, name):
    """If this breaks, a typing error in a name is a traceback of the library, or fetches something else."""
    with pytest.raises(ValueError) as error:
        local(name)
    assert WRONG[name] in str(error.value) and "\n" not in str(error.value)


def test_a_run_says_which_revision(hub):
    """If this breaks, a run that is repeated from its config.yaml trains on what the Hub has by then."""
    config = parse(["--load_model", "hf://org/model/m.pth", "--data_file", "hf://datasets/org/data:train"])
    found = with_local_files(config)
    assert read(found.load_model) == MODEL and len(found.data_file.split(",")) == 2
    text = config_text(found)
    assert f"load_model: hf://org/model@{COMMIT}/m.pth" in text
    assert f"hf://datasets/org/data@{COMMIT}/data/train-00000-of-00002.jsonl" in text
    again = [named_again(value) for value in (found.load_model, found.data_file)]
    assert [local(value) for value in again] == [found.load_model, found.data_file]
    with pytest.raises(ValueError, match=r"\{load_model\} hf://org/nothing/x.pth: there is no repository"):
        with_local_files(parse(["--load_model", "hf://org/nothing/x.pth", "--data_file", "x.jsonl"]))


def test_words_of_commands(hub):
    """If this breaks, other commands do not know names of the Hub, or take an address that is only written down."""
    words = [
        "--load_model=hf://org/one",
        "--source",
        "hf://org/one",
        "--input",
        "hf://datasets/org/plain",
        "--x",
        "a,b",
    ]
    model, *rest = local_words(words)
    assert read(model.partition("=")[2]) == MODEL and rest[1] == "hf://org/one" and read(rest[3]) == ROW
    assert rest[4:] == ["--x", "a,b"] and parse_name("hf://datasets/a/b@r/c:train:2")[1:] == (
        *("dataset", "a/b", "r", "c", "train"),
        ":2",
    )


def test_a_command_and_a_run_take_names(hub, script, tmp_path, base_model, vocab_file):
    """If this breaks, train.py knows no names, or convert reads the name as a path."""
    hub.repositories["org/tiny"] = {"tiny.pth": base_model.read_bytes()}
    words = ["--load_model", "hf://org/tiny", "--vocab_file", vocab_file, "--data_file", "hf://datasets/org/data"]
    words += ["--sft", 1, "--precision", "fp32", "--ctx_len", 32, "--epoch_steps", 1, "--epoch_count", 1, "--quant", 0]
    status, _, err = script(train.main, *words, "--proj_dir", tmp_path / "out")
    assert status == 0, err
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert f"load_model: hf://org/tiny@{COMMIT}/tiny.pth" in text
    (input_,) = local_words(["hf://datasets/org/data:validation"])
    status, _, err = script(convert, "--input", input_, "--output", tmp_path / "rows.jsonl")
    assert status == 0 and len([*map(json.loads, (tmp_path / "rows.jsonl").open())]) == 3, err


def test_the_package_is_asked_for(monkeypatch):
    """If this breaks, who has not installed huggingface_hub reads a traceback."""
    monkeypatch.setattr("rwkv_rlhf.settings.optional.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package huggingface_hub: pip install huggingface_hub"):
        local("hf://org/model/m.pth")


@pytest.mark.parametrize("flag", ["--data_file", "--teacher_model", "--val_file"])
def test_nothing_is_fetched_for_a_path_that_is_not_there(hub, script, flag):
    """If this breaks, a typing error in a path is said when gigabytes have come."""
    words = ["--load_model", "hf://org/model/m.pth", "--sft", 1, "--data_file", "hf://datasets/org/plain"]
    status, _, err = script(train.main, *words, flag, "none.pth" if flag == "--teacher_model" else "none.jsonl")
    assert status == 2 and f"{flag} none." in err and not hub.asked


def test_other_models_are_names_too(hub):
    """If this breaks, --teacher_model and --reward_model take paths only."""
    words = "--distillation 1 --load_model hf://org/one --data_file x.jsonl --teacher_model hf://org/model/m.pth"
    assert read(with_local_files(parse(words.split())).teacher_model) == MODEL
    words = "--load_model hf://org/one --ppo 1 --rlhf_train_file hf://datasets/org/plain --reward_model hf://org/one"
    assert read(with_local_files(parse(words.split())).reward_model) == MODEL
