"""Keys of the pretraining recipe, and why one missed.

    plan key       configuration, tokenizer bytes and file stamps: known before anything is read
    transform key  everything that happens to a range of one source: with the range's digest it names a shard
    dataset key    the shard keys in order: names the prepared directory

A plan record under `<cache>/plans/<plan-key>.json` leads from the first to the last, so that a second start reads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moai.config import identity
from moai.files import canonical_json, digest_json, write_atomic
from moai.recipes.options import DataConfig
from moai.recipes.prepared import FORMAT_VERSION
from moai.sources.discover import Input
from moai.tokenizer import TokenizerSpec
from moai.transforms import text

_NEAREST_OF = 200
_FILES_LISTED = 2000


def plan_fields(config: DataConfig, tokenizer: TokenizerSpec, inputs: Sequence[Input]) -> dict[str, Any]:
    """All that the plan key is made of. `files` are for explaining a miss; `inputs` says what is read how often, in which order, and what shares shards."""
    inputs_read = [[given.name, given.kind, [[file.name, file.path, file.stamp.as_list()] for file in given.files]] for given in inputs]
    files = {file.path: file.stamp.as_list() for given in inputs for file in given.files}
    return {
        "config": identity(config),
        "tokenizer": tokenizer.identity(),
        "format": {"format_version": FORMAT_VERSION, "text_version": text.VERSION},
        "inputs": digest_json(inputs_read),
        "files": files if len(files) <= _FILES_LISTED else {"": digest_json(files), "count": len(files)},
    }


def plan_key(fields: Mapping[str, Any]) -> str:
    return digest_json(fields)[:40]


def transform_identity(config: DataConfig, tokenizer: TokenizerSpec, given: Input, shape: text.TextShape | None) -> dict[str, Any]:
    """What a shard's content depends on besides its raw bytes. shard_bytes only says where ranges are cut."""
    fields = {name: value for name, value in identity(config).items() if name not in ("shard_bytes", "dataset_config", "text_column", "text_template")}
    return {
        "config": fields, "tokenizer": tokenizer.identity(), "format_version": FORMAT_VERSION, "text_version": text.VERSION, "kind": given.kind,
        "shape": [shape.name, list(shape.columns), shape.template] if shape else "plain text",
    }  # fmt: skip


def dataset_key(shard_keys: Iterable[str]) -> str:
    return digest_json(list(shard_keys))[:32]


def find_plan(cache: Path, key: str) -> dict[str, Any] | None:
    return _read(cache / "plans" / f"{key}.json")


def note_plan(cache: Path, key: str, fields: Mapping[str, Any], *, directory: str, trusted: bool) -> None:
    """Lead from the plan to its directory. `trusted` is False while a stamp is so young that it proves nothing."""
    write_atomic(cache / "plans" / f"{key}.json", canonical_json({"fields": fields, "directory": directory, "trusted": trusted}))


def explain_miss(cache: Path, key: str, fields: Mapping[str, Any]) -> str:
    """One line: how this plan differs from the nearest one that was prepared here."""
    records = sorted((cache / "plans").glob("*.json"), key=lambda path: path.name)[:_NEAREST_OF]
    best: list[str] | None = None
    for path in records:
        record = _read(path)
        if record is None or path.stem == key:
            continue
        differences = compare(record["fields"], fields)
        if best is None or len(differences) < len(best):
            best = differences
    if best is None:
        return "nothing was prepared in this cache yet"
    return "; ".join(best[:8]) + (f"; and {len(best) - 8} more" if len(best) > 8 else "") if best else "the files' order, repetition or grouping changed"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences between two plans' fields, each as a person would say it."""
    said = []
    for group in ("config", "tokenizer", "format"):
        before, after = old.get(group, {}), new[group]
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                said.append(f"{name} {_short(before.get(name))} -> {_short(after.get(name))}")
    before, after = old.get("files", {}), new["files"]
    shared = [path for path in after if path in before]
    said += [f"file {Path(path).name} changed ({_what_changed(before[path], after[path])})" for path in shared if before[path] != after[path]]
    said += [f"file {Path(path).name} added" for path in after if path not in before]
    said += [f"file {Path(path).name} gone" for path in before if path not in after]
    return said


def _what_changed(before: Any, after: Any) -> str:
    if not isinstance(before, list) or not isinstance(after, list):
        return "in a large set of files"
    return f"size {before[0]:,} -> {after[0]:,}" if before[0] != after[0] else "new time stamp, same size"


def _short(value: Any) -> str:
    text_ = str(value)
    return text_ if len(text_) <= 40 else text_[:12] + "…"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
