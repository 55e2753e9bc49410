"""Models and data of the Hugging Face Hub by name: hf://ORG/REPO/FILE, hf://datasets/ORG/NAME:split.

A name stands for files in the library's own cache (HF_HOME), which are brought there when they are missing: with a bar,
from where a download was cut off, compared with the Hub's checksum before they count. Without a connection the cache
serves. HF_ENDPOINT and tokens (`hf auth login`, HF_TOKEN) are the library's. A path in the cache says the revision, so
`named_again` makes a name of it that means the same file for ever.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rwkv_rlhf.files import MODEL_SUFFIXES, SHARDS_INDEX, read_json_object
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.formats import FORMATS, format_of_name
from rwkv_rlhf.settings.optional import require

log = logging.getLogger(__name__)

PREFIX = "hf://"
TEXTS = ("--source", "--name")  # flags whose words are no files
SETTINGS = (
    *("load_model", "load_adapter", "load_adapter_pissa_init", "load_cold_adapter", "reference_model"),
    *("teacher_model", "reward_model", "data_file", "pair_file", "val_file", "vocab_file", "layer_profile"),
)
_NAME = re.compile(
    r"hf://(?P<data>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>[^:]*))?"
    r"(?::(?P<split>[A-Za-z][\w-]*))?(?P<weight>:(?:\d+\.?\d*|\.\d+))?"
)
_CACHED = re.compile(r".*/(?P<kind>model|dataset)s--(?P<org>.+?)--(?P<repo>.+?)/snapshots/(?P<commit>\w+)/(?P<path>.+)")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
SHOWN = 12  # files that a sentence lists
BLOCK = 1 << 22  # bytes hashed at once


class Name(NamedTuple):
    """What a name asks for: kind "model" or "dataset"; revision "" = the newest; weight as `:2`, or ""."""

    text: str
    kind: str
    repo: str
    revision: str
    path: str
    split: str
    weight: str

    @property
    def shown(self) -> str:
        """The repository as a person writes it."""
        return f"datasets/{self.repo}" if self.kind == "dataset" else self.repo


class Listing(NamedTuple):
    """A repository at one moment: its commit, and its files in order."""

    commit: str
    files: list[str]


def parse_name(text: str) -> Name:
    """The parts of a name. Raises ValueError for what is none."""
    found = _NAME.fullmatch(text)
    if found is None or (found["split"] and not found["data"]):
        raise ValueError(f"{text}: expected hf://ORG/REPO/FILE, or hf://datasets/ORG/NAME[:split]")
    kind, path = "dataset" if found["data"] else "model", (found["path"] or "").strip("/")
    parts = (found["revision"] or "", path, found["split"] or "", found["weight"] or "")
    return Name(text, kind, found["repo"], *parts)


def local(text: str) -> str:
    """`text` with each name of the Hub in it replaced by the files that it stands for, which are here then.

    Raises ValueError for a name that is none, and for what cannot be had.
    """
    if PREFIX not in text:
        return text
    return ",".join(_brought(part.strip()) if part.strip().startswith(PREFIX) else part for part in text.split(","))


def local_words(words: Sequence[str]) -> list[str]:
    """The words of a command with local paths in place of names of the Hub; ValueError as `local`."""
    out = []
    for before, word in zip(["", *words], words):
        flag, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
        plain = (flag or before) in TEXTS or (not value.startswith(PREFIX) and f",{PREFIX}" not in value)
        out.append(word if plain else flag + separator + local(value))
    return out


def with_local_files(config: Config) -> Config:
    """`config` with local paths in place of names of the Hub. Raises ValueError, with the flag."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        value = getattr(config, name)
        if isinstance(value, str) and PREFIX in value:
            try:
                found[name] = local(value)
            except ValueError as error:
                raise ValueError(f"{{{name}}} {error}") from error
    return dataclasses.replace(config, **found) if found else config


def named_again(text: str) -> str:
    """The names, with their revision, of paths in the library's cache; other text stays."""
    return ",".join(_named_again(part) for part in text.split(",")) if "/snapshots/" in text else text


def _named_again(path: str) -> str:
    found = _CACHED.fullmatch(path)
    if found is None:
        return path
    data = "datasets/" if found["kind"] == "dataset" else ""
    return f"{PREFIX}{data}{found['org']}/{found['repo']}@{found['commit']}/{found['path']}"


def _brought(text: str) -> str:
    name = parse_name(text)
    require(text, "huggingface_hub")
    with _sentences(name):
        listing = _listing(name)
        paths = [_fetch(name, listing, path) for path in _wanted(name, listing)]
    if any("," in str(path) for path in paths):
        raise ValueError(f"{text}: a file's name holds a comma, which separates files; copy it to another name")
    log.info("%s: revision %s, %s", text, listing.commit[:12], ", ".join(path.name for path in paths))
    return ",".join(f"{path}{name.weight}" for path in paths)


@contextmanager
def _sentences(name: Name) -> Iterator[None]:
    """What the library raises, as ValueError with one sentence."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.shown}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name.text}: {name.repo} is gated: accept its conditions at {page}, then give a token (hf auth login, or "
            "HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name.text}: there is no repository {name.shown}, or it is private and needs a token (hf auth login, or "
            "HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name.text}: {name.shown} has no revision {name.revision}") from error
    except _lost() as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name.text}: cannot be had from {page} ({why}), and it is not in the cache") from error


def _lost() -> tuple[type[Exception], ...]:
    """What the library raises without a connection, or when the Hub fails."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its own HTTP client

    return HTTPError, OSError


def _listing(name: Name) -> Listing:
    """What the repository holds; without a connection, what the cache holds of it."""
    from huggingface_hub import HfApi, errors

    try:
        ask = HfApi().dataset_info if name.kind == "dataset" else HfApi().model_info
        info = ask(name.repo, revision=name.revision or None)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except _lost():
        cached = _cached_listing(name)
        if cached is None:
            raise
        log.warning("%s: no connection, the copy in the cache is used", name.text)
        return cached
    assert info.sha is not None
    return Listing(info.sha, sorted(one.rfilename for one in info.siblings or []))


def _storage(name: Name) -> Path:
    """The repository's folder in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type=name.kind)


def _cached_listing(name: Name) -> Listing | None:
    storage, revision = _storage(name), name.revision or "main"
    ref = storage / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = storage / "snapshots" / commit
    if not folder.is_dir():
        return None
    return Listing(commit, sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))


def _wanted(name: Name, listing: Listing) -> list[str]:
    """The files of the repository that a name means. Raises ValueError with what there is."""
    if name.kind == "dataset":
        return _data_files(name, listing.files)
    path = name.path or _only_model(name, listing.files)
    if path not in listing.files:
        raise ValueError(f"{name.text}: {name.shown} has no file {path}; {_listed(listing.files)}")
    return [path]


def _listed(files: Sequence[str]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"it has {', '.join(files[:SHOWN])}{more}" if files else "it is empty"


def _only_model(name: Name, files: Sequence[str]) -> str:
    found = [path for path in files if path.endswith(SHARDS_INDEX)]
    found = found or [path for path in files if path.endswith(tuple(MODEL_SUFFIXES.values()))]
    if len(found) != 1:
        raise ValueError(f"{name.text}: name one file of {name.shown}; {_listed(found or files)}")
    return found[0]


def _data_files(name: Name, files: Sequence[str]) -> list[str]:
    """The files of a split: those that have its word in their path, as the datasets library finds them too."""
    if name.path in files and not name.split:
        return [name.path]
    inside = [path for path in files if not name.path or path == name.path or path.startswith(f"{name.path}/")]
    data = [path for path in inside if _is_data(path)]
    if not data:
        raise ValueError(f"{name.text}: no file of data is there that can be read; {_listed(inside or files)}")
    splits = {path: _split_of(path, name.split) for path in data}
    wanted = name.split or ("train" if "train" in splits.values() else "")
    known = next((split for split, words in SPLITS.items() if wanted in words), wanted)
    found = [path for path, split in splits.items() if split == known]
    if not found:
        there = ", ".join(sorted({split for split in splits.values() if split})) or "none by their names"
        raise ValueError(f"{name.text}: no file of the split {wanted or 'train'}; splits: {there}; {_listed(data)}")
    folders = {os.path.dirname(path) for path in found}
    forms = {format_of_name(path) for path in found}
    if len(forms) > 1 or (len(folders) > 1 and len({_without_split(folder) for folder in folders}) > 1):
        raise ValueError(f"{name.text}: several sets are there; name a folder or a file behind it; {_listed(found)}")
    return found


def _is_data(path: str) -> bool:
    found = format_of_name(path)
    hidden = any(part.startswith((".", "_")) for part in path.split("/"))
    return bool(found and FORMATS[found].rows) and not hidden and os.path.basename(path) not in NO_DATA


def _split_of(path: str, asked: str) -> str:
    """The split of a file, "" where no word of its path names one; a word that is asked for counts too."""
    words = re.split(r"[^a-z0-9]+", path.lower())
    if asked and asked.lower() in words and not any(asked in known for known in SPLITS.values()):
        return asked
    return next((split for split, known in SPLITS.items() if set(known) & {*words}), "")


def _without_split(folder: str) -> str:
    return "/".join(part for part in folder.split("/") if not _split_of(part, ""))


def _fetch(name: Name, listing: Listing, path: str) -> Path:
    """A file in the cache, with what belongs to it: the shards of an index, the sidecar of a checkpoint."""
    found = _download(name, path, listing.commit)
    if path.endswith(SHARDS_INDEX):
        shards = read_json_object(found, "an index of safetensors").get("weight_map")
        for shard in sorted({*shards.values()}) if isinstance(shards, dict) else ():
            _download(name, str(Path(path).with_name(str(shard))), listing.commit)
    elif name.kind == "model" and f"{os.path.splitext(path)[0]}.json" in listing.files:
        _download(name, f"{os.path.splitext(path)[0]}.json", listing.commit)
    return found


def _download(name: Name, path: str, commit: str) -> Path:
    """One file of one commit, in the cache. Raises what the library raises, and ValueError for a damaged file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in its list

    ref = _storage(name) / "refs" / (name.revision or "main")
    pointer = _storage(name) / "snapshots" / commit / path
    if not pointer.exists():
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        url = hf_hub_url(name.repo, path, repo_type=name.kind, revision=commit)
        about = get_hf_file_metadata(url, headers=headers)
        if about.etag:
            if urlsplit(about.location).netloc != urlsplit(url).netloc:
                headers.pop("authorization", None)  # the storage of large files is another host
            _fill(_storage(name) / "blobs" / about.etag, about.location, headers, about.size, name, path)
        hf_hub_download(name.repo, path, repo_type=name.kind, revision=commit)
    if ref.name != commit and not (ref.is_file() and ref.read_text() == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)  # what the newest was, for times without a connection
    return pointer


def _fill(blob: Path, url: str, headers: dict[str, str], size: int | None, name: Name, path: str) -> None:
    """The bytes of a file, under the name that is their checksum; goes on where an earlier download ended."""
    from huggingface_hub.file_download import http_get

    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another rank, or another run, may want the same file
        if blob.exists():
            return
        begun = file.tell()
        if size is not None and begun > size:
            file.truncate(begun := 0)
        if begun:
            log.info("%s: going on behind the %.1f MB that are here", name.text, begun / 1e6)
        http_get(url, file, resume_size=begun, headers=headers, expected_size=size, displayed_filename=path)
        file.flush()
        os.fsync(file.fileno())
        if (hash_ := _checksum(part, blob.name)) != blob.name:
            part.unlink()
            raise ValueError(
                f"{name.text}: {path} arrived damaged (its checksum is {hash_[:12]}, the Hub says {blob.name[:12]}): "
                "try again"
            )
        os.replace(part, blob)


def _checksum(path: Path, like: str) -> str:
    """The SHA-256 of a file, or its hash in git, by which `like` is of the two; `like` itself where it is neither."""
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % path.stat().st_size)}.get(len(like))
    if digest is None or not re.fullmatch(r"[0-9a-f]+", like):
        return like
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
