"""What a folder means as data: its splits, datasets saved in it, and what lies beside the data.

    corpus/data/train.jsonl     read, as `datasets.load_dataset("corpus")` would
    corpus/data/test.jsonl      left out: split test
    corpus/saved/train/         written by `save_to_disk`: its training split is read
    corpus/LICENSE.txt          left out: not data
    corpus/notes.pdf            passed over

Whatever is there and is not read is kept with the reason, so that it can be said.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moai.core.errors import SourceError
from moai.sources.kinds import endings, kind_of

logger = logging.getLogger(__name__)

NOT_DATA = "not data"
"""Why a file that could be read is not: it speaks of the data, or of the code beside it."""
_ABOUT = re.compile(
    r"((.*[-_. ])?(licen[sc]es?|readme|requirements)|copying|copyright|notice|third[-_ ]party.*|read[-_ ]me"
    r"|change[-_]?log|contribut(ing|ors)|authors|citation|code[-_ ]of[-_ ]conduct|constraints|manifest|robots|llms"
    r"|cmakelists|install|todo|version|vocab|merges|(sha\d+|md5)(sums?)?|checksums?)([-_. ].*)?\.(txt|csv|tsv)",
    re.IGNORECASE,
)
_SETTINGS = re.compile(
    r"(dataset_infos?|dataset_dict|state|trainer_state|(.*[-_])?config|settings|package|package-lock|composer|tsconfig"
    r"|croissant|codemeta|(dataset[-_]|ro-crate-|.*\.)?metadata|(.*\.)?(index|schema)|info|stats|labels|label_?map|id2label"
    r"|label2id|tokenizer|special_tokens_map|added_tokens|vocab)\.json",
    re.IGNORECASE,
)
PREPARED = frozenset({"manifest.json", "state.json", "tokenizer.json"})
"""Files that together are in no folder but a prepared one."""
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")
# Splits as `datasets` finds them in names, in its order: sharded files, then folders, then files.
_SHARDED = re.compile(r"data/(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_ANY = re.compile("|".join(_WORDS.values()))
_FOLDER = {split: re.compile(rf"(.*[-._ 0-9])?({words})([-._ 0-9].*)?") for split, words in _WORDS.items()}
_FILE = {split: re.compile(rf"(.*[-._ 0-9])?({words})[-._ 0-9].*") for split, words in _WORDS.items()}
_CONFIGS = re.compile(rb"\A\xef?\xbb?\xbf?---\r?\n(?:(?!---).*\n)*?configs:", re.MULTILINE)


@dataclass
class Chosen:
    """Files of a folder to read, and by reason the names of what is left out though it could be read, or passed over
    since nobody reads it.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)

    def leave_out(self, why: str, *names: str) -> None:
        self.left_out.setdefault(why, []).extend(names)


def has_configs(folder: Path) -> bool:
    """Whether its README.md names configurations, as on the Hub: then `datasets` says which file belongs to what."""
    if (folder / ".huggingface.yaml").is_file():
        return True
    try:
        with open(folder / "README.md", "rb") as file:
            return bool(_CONFIGS.match(file.read(1 << 20)))
    except OSError:
        return False


def is_saved(folder: Path, names: Iterable[str]) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote what is in it: not where files of these names
    lie beside other data.
    """
    if not {"dataset_dict.json", "state.json"}.intersection(names):
        return False
    of_dict = any((folder / name / "state.json").is_file() for name in names)
    return of_dict or not any(kind_of(n) and not is_about_data(n) and not n.endswith(".arrow") for n in names)


def files_in(folder: Path, split: str | None = None) -> Chosen:
    """The files of one split, of the training split if none is named. Raises SourceError, naming what there is."""
    chosen = Chosen()
    names = os.listdir(folder)
    if PREPARED.issubset(names):
        raise SourceError(
            f"{folder}: is a prepared directory, whose rows are ready; train on it with --prepared {folder}"
        )
    if is_saved(folder, names):
        chosen.files = _saved(folder, folder, split, chosen)
        return chosen
    found, saved = _walk(folder, chosen)
    by_name = {_name(path, folder): [path] for path in found}
    for path in saved:
        if (path / "dataset_dict.json").is_file():
            chosen.files += _saved(path, folder, split, chosen)
        else:  # a folder that may be called like a split
            by_name[f"{_name(path, folder)}/*.arrow"] = _saved(path, folder, None, chosen)
    splits = splits_of(by_name)
    if splits:
        taken = taken_split(
            folder, splits, split, left=len(by_name) - len({name for of in splits.values() for name in of})
        )
        for other, names in splits.items():
            if other != taken and (rest := [name for name in names if name not in splits[taken]]):
                chosen.leave_out(f"split {other}", *rest)
        named = {name for names in splits.values() for name in names}
        if unnamed := [name for name in by_name if name not in named]:
            chosen.leave_out("no split", *unnamed)
        chosen.files += [path for name in splits[taken] for path in by_name[name]]
    elif split not in (None, "train") and by_name:
        raise SourceError(
            f"{folder}: has no split {split!r}: no file or folder in it is named like one (train, validation, test); "
            f"name the files by a pattern, as in '{folder}/**/*{Path(next(iter(by_name))).suffix}'"
        )
    else:
        chosen.files += [path for paths in by_name.values() for path in paths]
    if not chosen.files:
        there = "; ".join(f"{why}: {', '.join(names[:3])}" for why, names in chosen.left_out.items())
        raise SourceError(
            f"{folder}: no readable file in this directory (readable endings: {endings()})"
            + (f"; left out: {there}; a file that is named itself is read" if there else "")
        )
    chosen.files.sort(key=lambda file: file.relative_to(folder).as_posix().encode("utf-8", "surrogateescape"))
    return chosen


def splits_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> files, by names relative to the folder, as `datasets` reads them; empty where no name tells."""
    names = list(names)
    sharded: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARDED.fullmatch(name):
            sharded.setdefault(match["split"], []).append(name)
    if sharded:
        return sharded
    parts = [(name, name.split("/")) for name in names if _ANY.search(name)]
    in_folders = {
        split: [name for name, (*folders, _) in parts if any(map(pattern.fullmatch, folders))]
        for split, pattern in _FOLDER.items()
    }
    in_files = {
        split: [name for name, (*_, file) in parts if pattern.fullmatch(file)] for split, pattern in _FILE.items()
    }
    found = in_folders if any(in_folders.values()) else in_files
    return {split: its for split, its in found.items() if its}


def is_about_data(name: str) -> bool:
    """Whether a file's name says that it is no data: a licence, a list of packages, settings."""
    return bool(_ABOUT.fullmatch(name) or _SETTINGS.fullmatch(name))


def regular(path: Path) -> bool:
    """Whether there is a file to read. Raises SourceError for a link that leads nowhere: its data was there once."""
    if path.is_symlink() and not path.exists():
        raise SourceError(
            f"{path}: a link to {os.readlink(path)}, which is not there; fetch what it stands for (`git annex get`, or "
            f"the download again), or remove the link"
        )
    return path.is_file()


def taken_split(folder: Path | str, splits: Sequence[str] | dict[str, Any], split: str | None, left: int = 0) -> str:
    """The split to read. Raises SourceError where it is not there."""
    taken = split or "train"
    if taken in splits:
        return taken
    rest = f" and {left} files of none" if left else ""
    raise SourceError(
        f"{folder}: holds the splits {', '.join(splits)}{rest}; name one, as in {folder}@{next(iter(splits))}"
        + (f", or the files by a pattern, as in '{folder}/**/*'" if left or not split else "")
    )


def _saved(folder: Path, root: Path, split: str | None, chosen: Chosen) -> list[Path]:
    """The Arrow files of a saved dataset, of a saved dictionary those of one split."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", lambda value: value["splits"])
        taken = taken_split(folder, splits, split)
        for other in splits:
            if other != taken:
                chosen.leave_out(f"split {other}", _name(folder / other, root))
        folder = folder / taken
    elif split and folder == root:
        raise SourceError(f"{folder}: a saved dataset without splits; name it without @{split}")
    names = _listed(folder / "state.json", lambda value: [entry["filename"] for entry in value["_data_files"]])
    return [folder / name for name in names]


def _walk(root: Path, chosen: Chosen) -> tuple[list[Path], list[Path]]:
    """Readable files, and the folders of saved datasets."""
    found: list[Path] = []
    saved: list[Path] = []
    for place, folders, names in os.walk(root, onerror=_refuse):
        folder = Path(place)
        if folder != root and PREPARED.issubset(names):
            folders[:] = []
            chosen.leave_out("prepared rows, for --prepared", _name(folder, root))
            continue
        if folder != root and is_saved(folder, (*folders, *names)):
            folders[:] = []
            saved.append(folder)
            continue
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        if links := [f for f in folders if (folder / f).is_symlink()]:
            logger.warning(
                "%s: %d links to directories are not followed, the first %s; name them too if their files belong to "
                "the data",
                folder,
                len(links),
                links[0],
            )
            chosen.leave_out("links to directories", *(_name(folder / link, root) for link in links))
        for name in sorted(names):
            path = folder / name
            if name.startswith("."):
                continue
            if kind_of(path) is None or not regular(path):
                chosen.passed_over.append(_name(path, root))
            elif is_about_data(name):
                chosen.leave_out(NOT_DATA, _name(path, root))
            else:
                found.append(path)
    return found, saved


def unfinished(names: Iterable[str]) -> list[str]:
    """Those that a download left behind."""
    return [name for name in names if name.lower().endswith(_UNFINISHED)]


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


def _name(path: Path, root: Path) -> str:
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _refuse(error: OSError) -> None:
    raise SourceError(f"{error.filename}: {error.strerror}; without it the data would be another set") from error
