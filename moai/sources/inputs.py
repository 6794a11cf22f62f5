"""Inputs as every system finds and opens them: names to files, files to a source and its columns. Plain arguments, no
configuration.

inputs = find_inputs(["data/", "org/name@train"], cache)
source, columns = open_input(inputs[0], cache=cache, spool_dir=staging, shard_bytes=16 << 20, batch_bytes=4 << 20)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError
from moai.core.files import digest_json
from moai.engine.schema import Columns
from moai.sources.discover import Input, discover
from moai.sources.hub import HubName
from moai.sources.local import LocalSource
from moai.sources.schema import columns_of

_FILES_LISTED = 2000


def find_inputs(specs: Sequence[str], cache: Path, config: str | None = None) -> tuple[Input, ...]:
    """What `specs` name, each under a name of its own. `config` is that of a Hub dataset, for the first. Raises
    SourceError, ConfigError.
    """
    keep_apart(cache, specs)
    return distinct(given for index, spec in enumerate(specs) for given in discover(spec, None if index else config))


def stamps_prove(inputs: Iterable[Input]) -> bool:
    """No file was so young when it was looked at that a later write could leave its stamp as it is."""
    return not any(file.stamp.is_racy() for given in inputs for file in given.files)


def plan_inputs(inputs: Iterable[Input]) -> dict[str, Any]:
    """Inputs in a plan's fields. `files` are for explaining a miss; `inputs` says what is read how often, in which
    order, and what shares shards.
    """
    read = [
        [given.name, given.kind.identity, [[file.name, file.path, file.stamp.as_list()] for file in given.files]]
        for given in inputs
    ]
    files = {path: stamp for _, _, listed in read for _, path, stamp in listed}
    return {
        "inputs": digest_json(read),
        "files": files if len(files) <= _FILES_LISTED else {"": digest_json(files), "count": len(files)},
    }


def open_input(given: Input, **reading: Any) -> tuple[LocalSource, Columns]:
    """An input as a source, and the types of its columns; plain text has none. `reading` is fields of LocalSource.
    Raises SourceError.
    """
    source = LocalSource(name=given.name, kind=given.kind, files=given.files, **reading)
    return source, Columns() if given.kind.plain else columns_of(given)


def keep_apart(cache: Path, specs: Iterable[str]) -> None:
    """A cache inside the data would be data of the next run. Raises ConfigError."""
    for spec in specs:
        folder = Path(spec).expanduser()
        if not folder.exists():
            folder = Path(HubName.parse(spec).path).expanduser()
        if not folder.is_dir() or not cache.resolve().is_relative_to(folder.resolve()):
            continue
        if not any(
            part.startswith((".", "__")) for part in cache.resolve().relative_to(folder.resolve()).parts
        ):  # folders that are passed over
            raise ConfigError(
                f"--cache_dir {cache} lies inside the data {spec} and would be read as data by the next run; name "
                f"another"
            )


def distinct(inputs: Iterable[Input]) -> tuple[Input, ...]:
    """The inputs, each under a name of its own."""
    given = list(inputs)
    return tuple(replace(one, name=name) for one, name in zip(given, distinct_names(one.name for one in given)))


def distinct_names(names: Iterable[str]) -> list[str]:
    """Names of sources are names of shards: a second `train` becomes `train-2`."""
    found: dict[str, None] = {}
    for name in names:
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        found[next(free for free in numbered if free not in found)] = None
    return list(found)
