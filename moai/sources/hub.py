"""Hugging Face datasets as local files: `name[:config][@split]`, on the Hub or as a directory of the same layout.

The library `datasets` resolves what configuration and split mean. Files that moai reads itself (Parquet, JSON, text,
Arrow) are taken as they are, from the Hub's cache under their commit; any other format goes through `load_dataset`
once, whose Arrow files are then read. Either way the rest of moai sees files; `origin` keeps repository, commit,
configuration, split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.errors import SourceError
from moai.core.without_pandas import with_pandas
from moai.sources.kinds import kind_of

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
        return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path)) and kind_of(self.path) is None


@dataclass(frozen=True)
class HubFiles:
    paths: tuple[str, ...]
    origin: dict[str, str]
    left_out: Mapping[str, list[str]]
    """Splits and configurations that were not asked for."""


def fetch(name: HubName, *, readable: Callable[[str], bool]) -> HubFiles:
    """The files of one configuration and split. Raises SourceError when they cannot be resolved or fetched."""
    with_pandas()
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name.path, name.config)
    except Exception as error:
        if Path(name.path).is_dir():
            raise SourceError(
                f"{name.path}: `datasets` does not find its data ({type(error).__name__}: {_one_line(error)}); name a "
                f"configuration of its README.md, as in {name.path}:NAME, or files by a pattern, as in "
                f"'{name.path}/**/*'"
            ) from error
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
    left_out = {f"split {other}": [_relative(url, name.path) for url in of] for other, of in files.items()}
    left_out.pop(f"split {split}", None)
    if others := [config for config in builder.builder_configs if config != builder.config.name]:
        left_out["configurations"] = others
    urls = [str(url) for url in files.get(split, ())] if split else []
    if urls and all(readable(url) for url in urls):
        return HubFiles(tuple(_local(url, origin) for url in urls), origin, left_out)
    return HubFiles(_through_load_dataset(name, split or "train"), origin, left_out)


def _relative(url: str, path: str) -> str:
    match = _HUB_FILE.fullmatch(str(url))
    return match["file"] if match else os.path.relpath(url, path)


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


def _through_load_dataset(name: HubName, split: str) -> tuple[str, ...]:
    from datasets import load_dataset

    try:
        dataset: Any = load_dataset(name.path, name.config, split=split)
    except Exception as error:
        raise SourceError(
            f"{name.path}: load_dataset does not give split {split!r} ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return tuple(entry["filename"] for entry in dataset.cache_files)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
