"""Hugging Face datasets as local files: `name[:config][@split]`, on the Hub or as a directory of the same layout.

The library `datasets` resolves what configuration and split mean. Files that moai reads itself (Parquet, JSON, text,
Arrow) are taken as they are, from the Hub's cache under their commit; any other format goes through `load_dataset`
once, whose Arrow files are then read. Either way the rest of moai sees files; `origin` keeps repository, commit,
configuration, split.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.errors import SourceError
from moai.core.without_pandas import with_pandas

_HUB_FILE = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class HubName:
    """What stands in front of, between and behind the colon and the at sign."""

    path: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, spec: str, config: str | None = None) -> HubName:
        match = re.fullmatch(r"(?P<path>.+?)(?::(?P<config>[^:/@]+))?(?:@(?P<split>[^@/]+))?", spec)
        if not match:
            raise SourceError(f"{spec!r}: not a path, and not a dataset name (name[:config][@split])")
        return cls(match["path"], match["config"] or config, match["split"])

    def could_be_hub(self) -> bool:
        """`user/name` or a bare name without an ending; not a path."""
        return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path)) and not re.search(
            r"\.(jsonl?|ndjson|txt|parquet|arrow|gz|zst)$", self.path
        )


@dataclass(frozen=True)
class HubFiles:
    paths: tuple[str, ...]
    origin: dict[str, str]


def fetch(name: HubName, *, readable: Callable[[str], bool]) -> HubFiles:
    """The files of one configuration and split. Raises SourceError when they cannot be resolved or fetched."""
    with_pandas()
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name.path, name.config)
    except Exception as error:
        raise SourceError(
            f"{name.path}: neither a path here nor a dataset that the Hub gives ({type(error).__name__}: "
            f"{_one_line(error)}); "
            "check the name and the network, or download it and name its directory"
        ) from error
    files = builder.config.data_files or {}
    split = name.split or ("train" if "train" in files else None)
    if files and split not in files:
        raise SourceError(
            f"{name.path}: holds the splits {', '.join(map(str, files))}; name one, as in "
            f"{name.path}@{next(iter(files))}"
        )
    origin = {
        "dataset": name.path,
        "config": builder.config.name,
        "split": str(split or "train"),
        "commit": str(builder.hash or ""),
    }
    urls = [str(url) for url in files.get(split, ())] if split else []
    if urls and all(readable(url) for url in urls):
        return HubFiles(tuple(_local(url, origin) for url in urls), origin)
    return _through_load_dataset(name, split or "train", origin)


def _local(url: str, origin: dict[str, str]) -> str:
    """A file's path here: as it is, or from the Hub's cache."""
    match = _HUB_FILE.fullmatch(url)
    if not match:
        return str(Path(url).absolute())
    from huggingface_hub import hf_hub_download

    origin["commit"] = match["commit"]
    try:
        return str(hf_hub_download(match["repo"], match["file"], revision=match["commit"], repo_type="dataset"))
    except Exception as error:
        raise SourceError(
            f"{url}: not fetched ({type(error).__name__}: {_one_line(error)}); check the network and run again, "
            f"finished files are kept"
        ) from error


def _through_load_dataset(name: HubName, split: str, origin: dict[str, str]) -> HubFiles:
    from datasets import load_dataset

    try:
        dataset: Any = load_dataset(name.path, name.config, split=split)
    except Exception as error:
        raise SourceError(
            f"{name.path}: load_dataset does not give split {split!r} ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return HubFiles(tuple(entry["filename"] for entry in dataset.cache_files), origin)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
