"""`--save_to DIR`: a prepared directory under a name of the user's own, with all that training needs.

    prepared = prepare_and_save(config, SaveConfig(save_to="ready/ko"))       # in every rank, like prepare_or_wait

Its files are second names of the cache's, or copies where the file system has no links, so that the cache may go. With
--eval_ratio what is held out stands in `held_out/`, under the same manifest. The directory is made beside its place and
gets its name at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moai.core.errors import ConfigError, DamagedError
from moai.core.failpoints import failpoint
from moai.core.files import link_or_copy, remove_directory, replace_directory, storage_errors
from moai.core.stores import is_url
from moai.engine.executor import Executor
from moai.prepared.manifest import HELD_OUT, MANIFEST, Prepared, listed_files, read_manifest, write_manifest
from moai.prepared.stored import publish
from moai.pretraining.options import DataConfig, SaveConfig
from moai.pretraining.recipe import CALLER, prepare_all_or_wait

logger = logging.getLogger(__name__)


def prepare_and_save(
    config: DataConfig,
    saving: SaveConfig,
    *,
    origins: Mapping[str, str] = CALLER,
    environ: Mapping[str, str] = os.environ,
    executor: Executor | None = None,
) -> Prepared:
    """The prepared data, in the cache or, with save_to, where that says. Raises ConfigError where something else is
    there.
    """
    config = config.require()
    if saving.save_to is None and saving.publish is None:
        return prepare_all_or_wait([config], origins=origins, environ=environ, executor=executor)[0]
    place = Path(saving.save_to).expanduser().absolute() if saving.save_to else None
    if place:
        _check_place(place, config)
    if saving.publish and not is_url(saving.publish):
        raise ConfigError(f"--publish {saving.publish}: is no place in a store; name one, as s3://bucket/prefix")
    sides = [config, *([replace(config, held_out=True)] if config.eval_ratio and not config.held_out else [])]

    def finish(made: list[Prepared]) -> list[Prepared]:
        if saving.publish:
            publish(made, saving.publish)
        return save(made, place=place, overwrite=saving.overwrite) if place else made[:1]

    return prepare_all_or_wait(sides, origins=origins, environ=environ, executor=executor, finish=finish)[0]


def save(sides: Sequence[Prepared], *, place: Path, overwrite: bool = False) -> list[Prepared]:
    """Give a prepared directory, and what is held out of it, the name `place`. Returns it. Raises ConfigError,
    StorageError.
    """
    prepared, *others = sides
    held_out = others[0] if others else None
    staged = place.with_name(f".{place.name}.saving")
    remove_directory(staged)  # of a run that was killed
    if os.path.lexists(place) and (there := _holds(place, prepared, held_out)) != "":
        if not overwrite:
            raise ConfigError(f"--save_to {place}: {there}; name another, or replace it with --overwrite")
    elif os.path.lexists(place):
        logger.info("The same content is there already: %s", place)
        return [Prepared.open(place, memory_mode=prepared.memory_mode)]
    with storage_errors(place, "--save_to"):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fill(staged, prepared, held_out)
        except BaseException:
            remove_directory(staged)
            raise
        replace_directory(staged, place, named="save")
    logger.info("Saved to %s", place)
    return [Prepared.open(place, memory_mode=prepared.memory_mode)]


def _fill(staged: Path, prepared: Prepared, held_out: Prepared | None) -> None:
    """Both sides, and the manifest of both at the end."""
    _link(prepared, staged)
    if held_out:
        _link(held_out, staged / HELD_OUT)
    other = {name: held_out.manifest[name] for name in ("content", "content_digest", "run")} if held_out else None
    failpoint("save.manifest")
    write_manifest(staged, prepared.manifest["content"], prepared.manifest["run"], other)


def _link(prepared: Prepared, staged: Path) -> None:
    staged.mkdir()
    for entry in listed_files(prepared.manifest["content"]):
        failpoint("save.file")
        link_or_copy(prepared.path / entry["file"], staged / entry["file"])


def _check_place(place: Path, config: DataConfig) -> None:
    """Refuse before any work what can only be a mistake. Nothing but a prepared directory is ever replaced."""
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir() or not (place / MANIFEST).is_file()):
        raise ConfigError(f"--save_to {place}: is there and is no prepared directory; name another, or move it away")
    for spec in config.dataset:
        folder = Path(str(spec)).expanduser()
        if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"--save_to {place} lies inside the data {spec} and would be read as data by the next run; name another"
            )


def _holds(place: Path, prepared: Prepared, held_out: Prepared | None) -> str:
    """What else the directory of that name holds, in words; nothing if it holds just this, whole."""
    try:
        read_manifest(place)
        there = Prepared.open(place)
    except DamagedError as error:
        return f"is there and is not whole ({error})"
    wanted = [side.content_digest for side in (prepared, held_out) if side]
    found = [side.content_digest for side in (there, there.held_out) if side]
    if found == wanted:
        return ""
    return (
        f"holds other content ({found[0][:16]}{' and a held-out side' if there.held_out else ''}) than was prepared "
        f"now ({prepared.content_digest[:16]})"
    )
