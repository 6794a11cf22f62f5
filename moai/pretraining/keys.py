"""Keys of the pretraining recipe, and why one missed.

    plan key       configuration, tokenizer bytes and file stamps: known before anything is read
    transform key  everything that happens to a range of one source: with the range's digest it names a shard
    dataset key    the shard keys in order: names the prepared directory

A plan record under `<cache>/plans/<plan-key>.json` leads from the first to the last, so that a second start reads
nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.config import identity
from moai.core.errors import ConfigError
from moai.core.files import canonical_json, digest_json, is_plain_name, make_way, write_atomic
from moai.core.fsops import read_regular
from moai.engine.part import Part, class_identity, identity_of
from moai.engine.schema import Column
from moai.prepared.manifest import FORMAT_VERSION
from moai.pretraining.dataset import DatasetEntry
from moai.pretraining.options import DataConfig
from moai.quality.contamination import Contamination
from moai.quality.personal import MaskPersonalData
from moai.sources.discover import Input
from moai.sources.inputs import plan_inputs
from moai.tokenizers.load import TokenizerSpec, files_beside
from moai.transforms.chat import ToExamples
from moai.transforms.encode_examples import EncodeExamples
from moai.transforms.filters import Length, Sample, Split
from moai.transforms.pack import Pack
from moai.transforms.template import ChatTemplate
from moai.transforms.text import ToText
from moai.transforms.tokenize import Tokenize

PARTS: tuple[type[Part], ...] = (ToText, ToExamples, Length, Sample, Split, Tokenize, EncodeExamples, Pack)
"""What moai puts together itself: a plan is another one where the version of any of them is."""
_SAME_IDS = ("tokenizer_sha256", "eos_id", "bos_id", "chat_template_sha256")
_NEAREST_OF = 200
_SAME_SIZE = "old time stamp"
_MOST_BYTES = 1 << 26
"""Of a plan record: 2,000 paths of the greatest length take an eighth of it."""


def plan_fields(
    config: DataConfig,
    tokenizer: TokenizerSpec,
    inputs: Sequence[Input],
    entries: Sequence[DatasetEntry],
    template: ChatTemplate | None = None,
) -> dict[str, Any]:
    """All that the plan key is made of."""
    own = {given.name: said for given, entry in zip(inputs, entries) if (said := entry.settings())}
    left_out = {
        f"{given.name}: {why}": f"{len(names)} files, {digest_json(names)[:8]}"
        for given in inputs
        for why, names in given.left_out.items()
    }
    objects = [identity_of(entry.source) for entry in entries if entry.source]
    fields = {
        "config": {
            **identity(config),
            **({"transforms": [part.identity() for part in config.transforms]} if config.transforms else {}),
            **({"sources": own} if own else {}),
            **({"left_out": left_out} if left_out else {}),
            **({"quality": config.profile().identity()} if config.has_rules else {}),
            **({"decontaminate": contamination.identity()} if (contamination := contamination_of(config)) else {}),
            **({"pii": [config.pii, class_identity(MaskPersonalData)]} if config.pii != "none" else {}),
            **config.copies,
        },
        "tokenizer": tokenizer_identity(tokenizer, template),
        "format": {"format_version": FORMAT_VERSION, "parts": digest_json([class_identity(part) for part in PARTS])},
        **({"sources": objects} if objects else {}),
        **plan_inputs(inputs),
    }
    return dict(json.loads(canonical_json(fields)))  # as a record gives them back: a tuple is a list there


def contamination_of(config: DataConfig) -> Contamination | None:
    """What looks for the items of evaluations, where some are named. Raises ConfigError."""
    files = tuple(Path(name) for name in config.decontaminate)
    if missing := next((path for path in files if not path.is_file()), None):
        raise ConfigError(f"decontaminate: {missing}: no such file")
    return Contamination(files=files) if files else None


def plan_key(fields: Mapping[str, Any]) -> str:
    return digest_json(fields)[:40]


def tokenizer_identity(tokenizer: TokenizerSpec, template: ChatTemplate | None) -> dict[str, Any]:
    """What makes ids of texts, and of conversations the template too; and what stands beside it in the directory."""
    return {
        **tokenizer.identity(),
        **(template.identity() if template else {}),
        "tokenizer_files": digest_json(tokenizer_files(tokenizer)),
    }


def tokenizer_files(tokenizer: TokenizerSpec) -> list[str]:
    """What stands beside tokenizer.json and goes into the prepared directory with it."""
    return [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files_beside(Path(tokenizer.path)).items()]


def transform_identity(given: Input, parts: Sequence[Part], columns: Sequence[Column]) -> dict[str, Any]:
    """What a shard's content depends on besides its raw bytes: how a file is read, the parts as they are, and the
    columns of the rows.
    """
    return {
        "format_version": FORMAT_VERSION,
        "kind": given.kind.identity,
        "parts": [part.identity() for part in parts],
        "columns": [column.as_json() for column in columns],
    }


def dataset_key(shard_keys: Iterable[str]) -> str:
    return digest_json(list(shard_keys))[:32]


def find_plan(cache: Path, key: str) -> dict[str, Any] | None:
    return _read(cache / "plans" / f"{key}.json")


def plans(cache: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record, by key."""
    for path in sorted((cache / "plans").glob("[!.]*.json")):
        record = _read(path)
        if record is not None:
            yield path, record


def is_new(cache: Path) -> bool:
    """Nothing was prepared here yet."""
    return not any((cache / "plans").glob("[!.]*.json"))


def note_plan(cache: Path, key: str, fields: Mapping[str, Any], *, directory: str, trusted: bool) -> None:
    """Lead from the plan to its directory. `trusted` is False while a stamp is so young that it proves nothing."""
    path = cache / "plans" / f"{key}.json"
    make_way(path)
    known = {"directory": directory, "trusted": trusted, "files_judged": True}
    write_atomic(path, canonical_json({"fields": fields, **known}))


def explain_miss(cache: Path, key: str, fields: Mapping[str, Any]) -> str:
    """One line: how this plan differs from the nearest one that was prepared here."""
    near = nearest(cache, fields, without=key)
    if near is None:
        return "nothing was prepared in this cache yet"
    said = compare(near["fields"], fields)
    return "; ".join(said[:8]) + (f"; and {len(said) - 8} more" if len(said) > 8 else "")


def nearest(
    cache: Path, fields: Mapping[str, Any], *, directory: str | None = None, without: str | None = None
) -> dict[str, Any] | None:
    """The record that differs least, of those that lead to `directory` if one is named."""
    records = (
        record for path, record in plans(cache) if path.stem != without and directory in (None, record["directory"])
    )
    return min(
        itertools.islice(records, _NEAREST_OF),
        key=lambda record: len(differences(record["fields"], fields)),
        default=None,
    )


@dataclass(frozen=True)
class Difference:
    """One field in which two plans differ. `group` is its part of the plan's fields; a file's values say what it was
    and is.
    """

    group: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        if self.group == "inputs":
            return "the files' order, repetition or grouping changed"
        if self.group != "files":
            return f"{self.name} {self.before} -> {self.after}"
        if not self.before or not self.after:
            return f"file {Path(self.name).name} {'added' if self.after else 'gone'}"
        return (
            f"file {Path(self.name).name} changed "
            f"({self.before + ' -> ' if self.before != _SAME_SIZE else ''}{self.after})"
        )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences between two plans' fields, each as a person would say it."""
    return [str(difference) for difference in differences(old, new)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Differences between two plans' fields. That the inputs are others is said where no file says why."""
    found = []
    same_format = old.get("format") == new.get("format")
    for group in ("format", "config", "tokenizer"):
        before, after = (plan.get(group, {}) for plan in (old, new))
        # Another version's options are not said one by one: what they are absent for is the format.
        known = {*before, *after} if same_format or group == "format" else before.keys() & after.keys()
        names = [name for name in sorted(known) if before.get(name) != after.get(name)]
        found += [Difference(group, name, _short(before.get(name)), _short(after.get(name))) for name in names]
    before, after = old.get("files", {}), new["files"]
    shared = [path for path in after if path in before]
    found += [
        Difference("files", path, *_what_changed(before[path], after[path]))
        for path in shared
        if before[path] != after[path]
    ]
    found += [Difference("files", path, "", "there") for path in after if path not in before]
    found += [Difference("files", path, "there", "") for path in before if path not in after]
    if not any(difference.group == "files" for difference in found) and old.get("inputs") != new["inputs"]:
        found.append(Difference("inputs", "inputs", _short(old.get("inputs")), _short(new["inputs"])))
    return found


def stands_for(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a plan is of the same flags and tokenizer as another, whatever the versions, and covers all of its files,
    as far as they are listed.
    """
    before, after = ({**plan["config"], "left_out": None} for plan in (old, new))  # that names no shard
    same = before == after and all(old["tokenizer"].get(name) == new["tokenizer"].get(name) for name in _SAME_IDS)
    return same and "" not in old["files"] and old["files"].keys() <= new["files"].keys()


def _what_changed(before: Any, after: Any) -> tuple[str, str]:
    if not isinstance(before, list) or not isinstance(after, list):
        return "a large set", "another"
    return (
        (f"size {before[0]:,}", f"{after[0]:,}") if before[0] != after[0] else (_SAME_SIZE, "new time stamp, same size")
    )


def _short(value: Any) -> str:
    """A value for people; of parts their names, and a digest that tells two of one name apart."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "class" in one for one in value):
        return ", ".join(one["class"] for one in value) + f" ({digest_json(value)[:6]})"
    text_ = str(value)
    return text_ if len(text_) <= 40 else text_[:12] + "…"


def _read(path: Path) -> dict[str, Any] | None:
    """A plan record; None where it is absent, or is not one: what it would have saved is then done again."""
    try:
        record = json.loads(read_regular(path, _MOST_BYTES))
        groups = [record["fields"][name] for name in ("config", "tokenizer", "format", "files")]
        whole = (
            all(isinstance(group, dict) for group in groups)
            and isinstance(record["trusted"], bool)
            and is_plain_name(record["directory"])
            and plan_key(record["fields"]) == path.stem
        )
        return dict(record) if whole else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
