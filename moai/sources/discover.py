"""From what a person writes after --dataset to files: an existing path, a glob, or a Hugging Face dataset.

    data/a.jsonl   data/   'data/*.parquet'   saved_dataset/[@split]
    user/name[:config][@split]     folder:config[@split]

An existing path wins over a Hub name. Names are sorted, so that the order never depends on the file system.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.errors import SourceError
from moai.core.files import input_errors, storage_of
from moai.sources.hub import HubFiles, HubName, fetch
from moai.sources.kinds import File, Kind, endings, kind_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """The files of one kind that one --dataset word means. `origin` says where a Hub dataset came from."""

    spec: str
    name: str
    kind: Kind
    files: tuple[File, ...]
    origin: dict[str, str]

    @property
    def nominal_bytes(self) -> int:
        return sum(file.stamp.size for file in self.files)

    @property
    def text_bytes(self) -> int:
        """About how much there is once decompressed."""
        return sum(file.stamp.size * (4 if file.compression else 1) for file in self.files)


def discover(spec: str, config: str | None = None) -> list[Input]:
    """Inputs by kind. Raises SourceError when there is nothing to read, with what was looked for."""
    if not spec.strip():
        raise SourceError(f"{spec!r}: names no data; is a variable empty?")
    with input_errors(spec):
        paths, root, origin = _paths(spec, config)
    found = [_file(path, root) for path in paths]
    if not any(file.stamp.size for _, file in found):
        raise SourceError(
            f"{spec}: {'the file is' if len(found) == 1 else f'all {len(found)} files are'} empty; nothing to prepare"
        )
    name = short_name(spec)
    kinds = sorted({kind for kind, _ in found}, key=lambda kind: kind.name)
    of_kind = [(kind, tuple(file for its, file in found if its == kind and file.stamp.size)) for kind in kinds]
    return [
        Input(spec, name if len(kinds) == 1 else f"{name}.{kind.name}", kind, files, origin)
        for kind, files in of_kind
        if files
    ]


def _paths(spec: str, config: str | None) -> tuple[list[Path], Path, dict[str, str]]:
    path = Path(os.path.expanduser(spec))
    if path.exists():
        if path.is_dir():
            return _in_directory(path, None), path, {}
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{spec}: not a regular file or a directory")
        return [path], path.parent, {}
    name = HubName.parse(spec, config)
    local = Path(os.path.expanduser(name.path))
    if local.is_dir() and (local / "dataset_dict.json").exists() and not name.config:
        return _in_directory(local, name.split), local, {}
    if any(c in spec for c in "*?["):
        # A set: a pattern with several ** gives one path several times.
        found = sorted({Path(p) for p in glob.glob(str(path), recursive=True) if kind_of(p) and Path(p).is_file()})
        if not found:
            raise SourceError(f"{spec}: no file matches (readable endings: {endings()})")
        return found, Path(os.path.commonpath([str(p.parent) for p in found])), {}
    if not name.could_be_hub() and not local.is_dir():
        raise SourceError(f"{spec}: no such file or directory (in {Path.cwd()})")
    fetched: HubFiles = fetch(name, readable=lambda file: kind_of(file) is not None)
    return (
        [Path(p) for p in fetched.paths],
        Path(os.path.commonpath([os.path.dirname(p) for p in fetched.paths])),
        fetched.origin,
    )


def _in_directory(path: Path, split: str | None) -> list[Path]:
    if (path / "dataset_dict.json").exists():
        splits = _listed(path / "dataset_dict.json", lambda value: value["splits"])
        split = split or ("train" if "train" in splits else None)
        if split is None or split not in splits:
            raise SourceError(f"{path}: holds the splits {', '.join(splits)}; name one, as in {path}@{splits[0]}")
        path = path / split
    if (path / "state.json").exists():
        return [
            path / name
            for name in _listed(
                path / "state.json", lambda value: [entry["filename"] for entry in value["_data_files"]]
            )
        ]
    found: list[Path] = []
    passed_over: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        links = [f for f in folders if (Path(folder) / f).is_symlink()]
        if links:
            logger.warning(
                "%s: %d links to directories are not followed, the first %s; name them too if their files belong to "
                "the data",
                folder,
                len(links),
                links[0],
            )
        for name in sorted(names):
            file = Path(folder) / name
            if name.startswith("."):
                continue
            (found if kind_of(file) and file.is_file() else passed_over).append(file)
    if not found:
        raise SourceError(f"{path}: no readable file in this directory (readable endings: {endings()})")
    if passed_over:
        logger.info(
            "%s: %d files passed over (no readable ending), the first %s", path, len(passed_over), passed_over[0].name
        )
    return sorted(found, key=lambda file: file.relative_to(path).as_posix().encode("utf-8", "surrogateescape"))


def _listed(file: Path, names_in: Callable[[Any], list[str]]) -> list[str]:
    """Names of files or folders beside `file`, from what `datasets` wrote into it. Raises SourceError unless they are
    plain names of things that exist.
    """
    try:
        names = names_in(json.loads(file.read_bytes()))
        bad = [name for name in names if os.path.basename(name) != name or name in ("", ".", "..")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{file}: not as `datasets` writes it ({type(error).__name__}: {error}); save the dataset again"
        ) from error
    if bad or not names:
        raise SourceError(f"{file}: {f'the name {bad[0]!r} leaves the directory' if bad else 'lists nothing'}")
    return names


def _refuse(error: OSError) -> None:
    raise SourceError(f"{error.filename}: {error.strerror}; without it the data would be another set") from error


def _file(path: Path, root: Path) -> tuple[Kind, File]:
    known = kind_of(path)
    if known is None:
        settings = "; a file of settings is named by --config" if path.suffix.lower() in (".yaml", ".yml") else ""
        raise SourceError(f"{path}: unknown kind of file (readable endings: {endings()}){settings}")
    absolute = path.absolute()
    name = os.fsencode(absolute.relative_to(root.absolute()).as_posix()).decode("utf-8", "backslashreplace")
    with input_errors(absolute):
        return known[0], File(str(absolute), name, known[1], storage_of(str(absolute)).stamp(str(absolute)))


def short_name(spec: str) -> str:
    """What a source is called that has no name of its own: the path's last part."""
    name = os.path.basename(os.path.normpath(spec)) or "data"
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
