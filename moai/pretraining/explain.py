"""Why a preparation would not find what was prepared before: two keys, field by field.

    python -m moai explain --dataset ... --seq_len 512                        against the nearest one in the cache
    python -m moai explain --dataset ... --seq_len 512 --against DIR          against that directory

Reads no data but the tokenizer, and writes nothing. A directory far from the cache that made it has no plan record;
then its manifest tells flags, tokenizer and how many files of which kind there were, but not which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.config import option
from moai.prepared.manifest import Prepared, read_manifest
from moai.pretraining import keys as identity
from moai.pretraining.assembly import Request, request
from moai.pretraining.keys import Difference
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import find_prepared, why_missed

_CUTS = "other cuts: only shards that are cut at the same places are reused"
_READS = "finished shards are reused where the text comes from the same columns"
_REUSE = {
    "shard_bytes": _CUTS,
    "dataset_config": "other data",
    "sources": "other data",
    "left_out": "another directory of the same shards",
    "tokenizer_files": "another directory of the same shards",
    "text_column": _READS,
    "text_template": _READS,
}
"""Fields that name no shard. Any other that differs makes every shard anew."""
_FILES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What is compared."""

    against: str | None = option(None, "a prepared directory; without it, the nearest one in the cache")


def explain(config: DataConfig, against: str | None = None) -> Iterator[str]:
    """Lines: both keys, every field that differs with both values and what that costs, the fields that are the same.

    Raises DamagedError when `against` is no prepared directory.
    """
    wanted = request(config.require())
    yield f"plan key     {wanted.key}"
    manifest = read_manifest(Path(against)) if against else None
    here = against is None or Path(against).resolve().parent == (wanted.cache / "datasets").resolve()
    record = (
        identity.nearest(wanted.cache, wanted.fields, directory=Path(against).resolve().name if against else None)
        if here
        else None
    )
    if manifest is not None and record is None:
        yield f"against      {against}, by its manifest: no plan of this cache leads there"
        yield from _said(list(_by_manifest(manifest, wanted)), wanted, files_known=False)
    elif record is not None:
        yield (
            f"against      {wanted.cache / 'datasets' / record['directory']}, by the plan "
            f"{identity.plan_key(record['fields'])}"
        )
        yield from _said(identity.differences(record["fields"], wanted.fields), wanted)
    else:
        yield "against      nothing: nothing was prepared in this cache yet"
    yield f"verdict      {_verdict(wanted)}"


def _verdict(wanted: Request) -> str:
    found: Prepared | None = find_prepared(wanted)
    return f"a hit: {found.path}" if found else f"a miss: {why_missed(wanted)}"


def _said(found: Sequence[Difference], wanted: Request, *, files_known: bool = True) -> Iterator[str]:
    files = [difference for difference in found if difference.group == "files"]
    for difference in found:
        if difference.group not in ("files", "inputs"):
            yield f"differs      {difference.name}: {difference.before} -> {difference.after}  ({_cost(difference)})"
        elif difference.group == "inputs":
            yield f"differs      {difference}"
    for difference in files[:_FILES_SHOWN]:
        # The whole path: the same name may lie in several folders.
        yield (
            f"differs      {str(difference).replace(Path(difference.name).name, difference.name, 1)}  (its ranges "
            f"are read; those with the same content reuse their shards)"
        )
    if len(files) > _FILES_SHOWN:
        kinds = Counter("added" if not d.before else "gone" if not d.after else "changed" for d in files)
        yield (
            f"differs      {len(files) - _FILES_SHOWN} more files; in all "
            f"{', '.join(f'{number} {kind}' for kind, number in kinds.items())}"
        )
    names = {difference.name for difference in found}
    same = [name for group in ("config", "tokenizer", "format") for name in wanted.fields[group] if name not in names]
    unchanged = ""
    if not files and not names & {"inputs", "sources"}:
        unchanged = ", all files" if files_known else ", as many files of each kind; a manifest knows no more of them"
    yield f"same         {', '.join(same)}{unchanged}"


def _cost(difference: Difference) -> str:
    return _REUSE.get(difference.name, "part of every shard's key: nothing is reused")


def _by_manifest(manifest: Mapping[str, Any], wanted: Request) -> Iterator[Difference]:
    """What a manifest knows of a plan: not the files' stamps, so only how many files of which kind."""
    content = manifest["content"]
    old = {
        "config": content["config"],
        "tokenizer": {name: content["tokenizer"].get(name) for name in wanted.fields["tokenizer"]},
        "format": {**wanted.fields["format"], "format_version": content["format_version"]},
        "files": wanted.fields["files"],
        "inputs": wanted.fields["inputs"],
    }
    yield from identity.differences(old, wanted.fields)
    before = [f"{source['name']}: {source.get('files')} {source['kind']} files" for source in content["sources"]]
    after = [f"{given.name}: {len(given.files)} {given.kind.name} files" for given in wanted.inputs]
    if before != after:
        yield Difference("sources", "sources", "; ".join(before), "; ".join(after))
