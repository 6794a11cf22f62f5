"""`--save_to DIR`: a prepared directory under a name of the user's own, with all that training needs.

    prepared = prepare_and_save(config, SaveConfig(save_to="ready/ko"))       # in every rank, like prepare_or_wait

Its files are second names of the cache's, or copies where the file system has no links, so that the cache may go. With --eval_ratio
what is held out stands in `held_out/`, under the same manifest. The directory is made beside its place and gets its name at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moai.config import option
from moai.errors import ConfigError, DamagedError
from moai.failpoints import failpoint
from moai.files import link_or_copy, remove_directory, replace_directory, storage_errors
from moai.recipes.options import DataConfig
from moai.recipes.prepared import HELD_OUT, MANIFEST, Prepared, listed_files, read_manifest, write_manifest
from moai.recipes.pretraining import prepare_all_or_wait

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Saving: what is prepared, under a name of your own."""

    save_to: str | None = option(None, "also give the prepared directory this name: links or copies of all that training needs")
    overwrite: bool = option(False, "replace a prepared directory of other content that save_to names")

    def __post_init__(self) -> None:
        if self.overwrite and self.save_to is None:
            raise ConfigError("overwrite is set and save_to is not: name the directory with --save_to DIR")


def prepare_and_save(config: DataConfig, saving: SaveConfig, *, origins: Mapping[str, str] | None = None, environ: Mapping[str, str] = os.environ) -> Prepared:
    """The prepared data, in the cache or, with save_to, where that says. Raises ConfigError where something else is there."""
    config = config.require()
    known = {"origins": origins} if origins is not None else {}
    if saving.save_to is None:
        return prepare_all_or_wait([config], environ=environ, **known)[0]
    place = Path(saving.save_to).expanduser().absolute()
    _check_place(place, config)
    sides = [config, *([replace(config, held_out=True)] if config.eval_ratio and not config.held_out else [])]
    return prepare_all_or_wait(sides, environ=environ, finish=partial(save, place=place, overwrite=saving.overwrite), **known)[0]


def save(sides: Sequence[Prepared], *, place: Path, overwrite: bool = False) -> list[Prepared]:
    """Give a prepared directory, and what is held out of it, the name `place`. Returns it. Raises ConfigError, StorageError."""
    prepared, *others = sides
    held_out = others[0] if others else None
    if os.path.lexists(place) and (there := _holds(place, prepared, held_out)) != "":
        if not overwrite:
            raise ConfigError(f"--save_to {place}: {there}; name another, or replace it with --overwrite")
    elif os.path.lexists(place):
        logger.info("The same content is there already: %s", place)
        return [Prepared.open(place, memory_mode=prepared.memory_mode)]
    with storage_errors(place, "--save_to"):
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = place.with_name(f".{place.name}.saving")
        remove_directory(staged)  # of a run that was killed
        _link(prepared, staged)
        if held_out:
            _link(held_out, staged / HELD_OUT)
        other = {name: held_out.manifest[name] for name in ("content", "content_digest", "run")} if held_out else None
        failpoint("save.manifest", staged)
        write_manifest(staged, prepared.manifest["content"], prepared.manifest["run"], other)
        replace_directory(staged, place, named="save")
    logger.info("Saved to %s", place)
    return [Prepared.open(place, memory_mode=prepared.memory_mode)]


def _link(prepared: Prepared, staged: Path) -> None:
    staged.mkdir()
    for entry in listed_files(prepared.manifest["content"]):
        failpoint("save.file", prepared.path / entry["file"])
        link_or_copy(prepared.path / entry["file"], staged / entry["file"])


def _check_place(place: Path, config: DataConfig) -> None:
    """Refuse before any work what can only be a mistake. Nothing but a prepared directory is ever replaced."""
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir() or not (place / MANIFEST).is_file()):
        raise ConfigError(f"--save_to {place}: is there and is no prepared directory; name another, or move it away")
    for spec in config.dataset:
        folder = Path(str(spec)).expanduser()
        if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--save_to {place} lies inside the data {spec} and would be read as data by the next run; name another")


def _holds(place: Path, prepared: Prepared, held_out: Prepared | None) -> str:
    """What else the directory of that name holds, in words; nothing if it holds just this, whole."""
    try:
        read_manifest(place)
        there = Prepared.open(place)
    except DamagedError as error:
        return f"is there and is not whole ({error})"
    wanted = [side.content_digest if side else None for side in (prepared, held_out)]
    found = [side.content_digest if side else None for side in (there, there.held_out)]
    if found == wanted:
        return ""
    return f"holds other content ({found[0][:16]}{' and a held-out side' if found[1] else ''}) than was prepared now ({prepared.content_digest[:16]})"
