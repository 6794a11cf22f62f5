"""From what a person writes after --dataset to files: an existing path, a glob, or a Hugging Face dataset.

    data/a.jsonl   'data/*.parquet'   folder[:config][@split]   user/name[:config][@split]

An existing path wins over a Hub name. Names are sorted, so that the order never depends on the file system.
"""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moai.core.errors import SourceError, printable
from moai.core.files import input_errors, storage_of
from moai.core.stores import is_url
from moai.sources.folders import (
    NOT_DATA,
    Chosen,
    files_in,
    has_configs,
    is_about_data,
    regular,
    splits_of,
    unfinished,
)
from moai.sources.hub import HubFiles, HubName, fetch
from moai.sources.kinds import File, Kind, endings, kind_of
from moai.sources.stored import objects_in

logger = logging.getLogger(__name__)


_MANY_TEXTS, _TEXT_BYTES = 20, 200_000
"""So many text files, of no more bytes on average, look like a document each."""
_FEW_FILES, _FEW_BYTES, _SHARE = 5, 1 << 20, 100
"""So few files of another kind, of so few bytes and under a hundredth of the data's, are no part of it."""


@dataclass(frozen=True)
class Input:
    """The files of one kind that one --dataset word means. `origin` says where a Hub dataset came from."""

    spec: str
    name: str
    kind: Kind
    files: tuple[File, ...]
    origin: dict[str, str]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By reason, the files that lie there and are not read though they could be, and splits."""
    passed_over: tuple[str, ...] = ()
    """Files that nobody reads."""
    bad: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By what they are instead, the files that hold no data (`moai.sources.mistaken`)."""

    @property
    def place(self) -> str:
        """What was named and, where that is not the file, the first file: for people."""
        if not self.files:  # a source of the user's own
            return self.spec
        first, more = self.files[0], len(self.files) - 1
        if not more and Path(first.path) == Path(self.spec).expanduser().absolute():
            return self.spec
        return f"{self.spec} ({printable(first.name)}{f' and {more} more' if more else ''})"

    @property
    def nominal_bytes(self) -> int:
        return sum(file.stamp.size for file in self.files)

    @property
    def text_bytes(self) -> int:
        """About how much there is once decompressed."""
        return sum(file.stamp.size * (4 if file.compression else 1) for file in self.files)


def discover(spec: str, config: str | None = None) -> list[Input]:
    """Inputs by kind. Raises SourceError when there is nothing to read, with what was looked for.

    What lies there and is not read is said in the log, and kept with the first of them.
    """
    if not spec.strip():
        raise SourceError(f"{spec!r}: names no data; is a variable empty?")
    if is_url(spec):
        found, chosen = objects_in(spec)
        inputs = _inputs(spec, found, chosen, {})
        _say(spec, HubName.parse(spec), chosen, None)
        return inputs
    with input_errors(spec):
        name = _named(spec, config)
        chosen, root, origin = _chosen(spec, name)
    found = [_file(path, root) for path in chosen.files]
    inputs = _inputs(spec, found, chosen, origin, folder=name.path if root == Path(name.path) else "")
    _say(spec, name, chosen, root)
    return inputs


def _inputs(
    spec: str, found: Sequence[tuple[Kind, File]], chosen: Chosen, origin: dict[str, str], folder: str = ""
) -> list[Input]:
    """The files by kind. What is left out besides is added to `chosen`."""
    if not any(file.stamp.size for _, file in found):
        raise SourceError(
            f"{spec}: {'the file is' if len(found) == 1 else f'all {len(found)} files are'} empty; nothing to prepare"
        )
    if empty := [file.name for _, file in found if not file.stamp.size]:
        chosen.leave_out("empty", *empty)
    of_kind: dict[Kind, tuple[File, ...]] = {}
    for kind in sorted({kind for kind, _ in found}, key=lambda kind: kind.name):
        if files := tuple(file for its, file in found if its == kind and file.stamp.size):
            of_kind[kind] = files
    if os.path.isdir(folder):
        for kind in _beside(spec, of_kind):
            chosen.leave_out(NOT_DATA, *(file.name for file in of_kind.pop(kind)))
    called = short_name(spec)
    inputs = [
        Input(spec, called if len(of_kind) == 1 else f"{called}.{kind.name}", kind, files, origin)
        for kind, files in of_kind.items()
    ]
    left_out = {why: tuple(names) for why, names in chosen.left_out.items()}
    return [replace(inputs[0], left_out=left_out, passed_over=tuple(chosen.passed_over)), *inputs[1:]]


def some(names: Sequence[str], joint: str = ", ") -> str:
    """A list for people: the first three, and how many more."""
    return printable(joint.join(names[:3])) + (f"{joint}and {len(names) - 3:,} more" if len(names) > 3 else "")


def named_as_splits(paths: Sequence[str | Path]) -> str | None:
    """What is to be asked where files that are read together are called like splits, and not all like the same one."""
    absolute = [
        path for path in (os.path.abspath(os.path.expanduser(given)) for given in paths) if os.path.exists(path)
    ]
    if len(absolute) < 2:
        return None
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [os.path.relpath(path, root) for path in absolute]
    splits = splits_of([name if kind_of(name) else f"{name}/*" for name in names])
    if not splits or set(splits) == {"train"} or any(len(of) == len(absolute) for of in splits.values()):
        return None
    said = "; ".join(f"{split}: {some(of)}" for split, of in splits.items())
    return f"reads together what is named as splits ({said}); what is to be evaluated on belongs in none of it"


def documents_in(given: Input) -> str:
    """What a document is in plain text."""
    return f"a document a {given.kind.settings['txt_document']}"


def many_small_texts(given: Input) -> str | None:
    """What is to be asked where files that are read line by line look like documents."""
    if not given.kind.plain or given.kind.settings.get("txt_document") != "line" or len(given.files) < _MANY_TEXTS:
        return None
    average = given.text_bytes // len(given.files)
    if average > _TEXT_BYTES:
        return None
    return (
        f"{given.name}: {len(given.files):,} text files of {average:,} bytes on average are read as a document a line; "
        f"if each is one document, set --txt_document file"
    )


def _named(spec: str, config: str | None) -> HubName:
    """Path, configuration and split; of a path that exists the whole is the path."""
    path = os.path.expanduser(spec)
    if os.path.exists(path):
        return HubName(path, config if os.path.isdir(path) else None, None)
    name = HubName.parse(spec, config)
    local = os.path.expanduser(name.path)
    return replace(name, path=local) if os.path.exists(local) else name


def _chosen(spec: str, name: HubName) -> tuple[Chosen, Path, dict[str, str]]:
    """Files, the folder that their names are relative to, and where a Hub dataset came from."""
    path = Path(name.path)
    if path.is_dir() and not name.config and not has_configs(path):
        return files_in(path, name.split), path, {}
    if path.exists() and not path.is_dir():
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{spec}: not a regular file or a directory")
        if name.split or name.config:
            raise SourceError(f"{spec}: {path.name} is a file, which has no splits or configurations")
        return Chosen([path]), path.parent, {}
    if any(c in spec for c in "*?[") and not path.is_dir():
        return _matching(spec)
    if not name.could_be_hub() and not path.is_dir():
        raise SourceError(f"{spec}: no such file or directory (in {Path.cwd()})")
    try:
        fetched: HubFiles = fetch(name, readable=lambda file: kind_of(file) is not None)
    except SourceError:
        part = path / str(name.config)
        if name.config is None or not part.is_dir():
            raise
        # A part of a Hub dataset, downloaded by itself: its README lists configurations whose files are not here.
        origin = {"dataset": name.path, "config": name.config, "split": name.split or "train", "commit": ""}
        mine = sorted(
            file for file in part.rglob("*") if _is_of(file.relative_to(part), name.split) and kind_of(file.name)
        )
        return (Chosen(mine) if mine else files_in(part, name.split)), part, origin
    paths = [Path(p) for p in fetched.paths]
    return Chosen(paths, dict(fetched.left_out)), Path(os.path.commonpath([p.parent for p in paths])), fetched.origin


def _is_of(file: Path, split: str | None) -> bool:
    """Whether a file is called, or lies in a folder called, like a split that is none of the usual ones."""
    return split is not None and (split in file.parts or file.name.startswith(f"{split}-"))


def _matching(spec: str) -> tuple[Chosen, Path, dict[str, str]]:
    """The files that a pattern names."""
    pattern = os.path.expanduser(spec)
    # A set: a pattern with several ** gives one path several times.
    matches = sorted({Path(p) for p in glob.glob(pattern, recursive=True) if kind_of(p) and regular(Path(p))})
    chosen = Chosen([path for path in matches if not is_about_data(path.name)])
    if about := [path.name for path in matches if is_about_data(path.name)]:
        chosen.leave_out(NOT_DATA, *about)
    if not chosen.files:
        raise SourceError(
            f"{spec}: no file matches (readable endings: {endings()})"
            + (f"; left out: {some(about)}; a file that is named itself is read" if about else "")
        )
    if warning := named_as_splits(chosen.files):
        logger.warning("%s: %s", spec, warning)
    return chosen, Path(os.path.commonpath([str(p.parent) for p in chosen.files])), {}


def _beside(spec: str, of_kind: Mapping[Kind, Sequence[File]]) -> list[Kind]:
    """Kinds of which there is so little beside another kind that it is no data. Of a little more it is said that it is
    read.
    """
    sizes = {kind: sum(file.stamp.size for file in files) for kind, files in of_kind.items()}
    most = max(sizes.values())
    few = [kind for kind, size in sizes.items() if len(of_kind[kind]) <= _FEW_FILES and size < min(most, _FEW_BYTES)]
    strays = [kind for kind in few if sizes[kind] * _SHARE < most]
    if doubtful := [file.name for kind in few if kind not in strays for file in of_kind[kind]]:
        logger.warning(
            "%s: reads also what is of another kind than most of it: %s; name files by a pattern to leave these out",
            spec,
            some(doubtful),
        )
    return strays


def _names(path: str, chosen: Chosen) -> Iterator[str]:
    """How what is left out would be named, an example of each."""
    for why, names in chosen.left_out.items():
        if why == "configurations":
            yield f"{path}:{names[0]}"
        elif why.startswith("split "):
            yield f"{path}@{why.removeprefix('split ')}"
        elif why in (NOT_DATA, "no split"):
            yield os.path.join(path, names[0])


def _say(spec: str, name: HubName, chosen: Chosen, root: Path | None) -> None:
    """What is not read, once: a warning, unless it was asked for, or is nothing that could be data."""
    if chosen.left_out:
        asked = bool(name.split or name.config) and all("split" in why or "config" in why for why in chosen.left_out)
        logger.log(
            logging.INFO if asked else logging.WARNING,
            "%s: not read: %s%s",
            spec,
            "; ".join(f"{why}: {len(names)} ({some(names)})" for why, names in chosen.left_out.items()),
            f" (what is named is read: {some(named)})" if (named := list(_names(name.path, chosen))) else "",
        )
    if lost := unfinished(chosen.passed_over):
        logger.warning("%s: %d unfinished downloads are not read: %s; fetch them again", spec, len(lost), some(lost))
    if chosen.passed_over:
        there = [root / name for name in chosen.passed_over] if root else []
        others = sum(os.path.getsize(path) for path in there if path.is_file())
        logger.log(
            logging.WARNING if others > sum(path.stat().st_size for path in chosen.files) else logging.INFO,
            "%s: %d files passed over (no readable ending), the first %s",
            spec,
            len(chosen.passed_over),
            some(chosen.passed_over[:1]),
        )


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
