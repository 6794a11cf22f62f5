"""What a manifest must hold, by the recipe that wrote it: the one table that `verify`, `repair`, `gc` and every reader
go by.

Their text is spelled and sealed in the same way (`moai.prepared.manifest`), and `content` always has `shards` and
`files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PRETRAINING = "pretraining"
ENTITY_COREF = "entity_coref"


@dataclass(frozen=True)
class Format:
    """`shape` says what a reader relies on. In a list every entry has the shape, and under `*` every value of an
    object; numbers are not negative.
    """

    version: int
    shape: Mapping[str, Any]
    command: str
    """What makes such a directory."""
    folders: tuple[str, ...] = ()
    """Its splits, each a folder of that name with what `datasets` opens; without any, the directory is that itself."""
    unlisted: frozenset[str] = frozenset()
    """Files beside the manifest that it cannot list, since they tell when the directory was made."""


_FILE = {"file": str, "bytes": int, "xxh3_128": str}
_SHARD = {
    "file": (str, type(None)),
    "rows": int,
    "bytes": int,
    "xxh3_128": str,
    "shard_key": str,
    "source": str,
    "documents": int,
    "tokens": int,
    "raw_digest": str,
    "documents_file": _FILE,
}
_PRETRAINING = {
    "content": {
        "format_version": int,
        "recipe": str,
        "config": dict,
        "seq_len": int,
        "packing": str,
        "columns": [{"name": str, "type": str, "per": str}],
        "transforms": list,
        "vocab_size": int,
        "tokenizer": {"tokenizer_sha256": str, "eos_id": int, "bos_id": (int, type(None)), "eos_token": str},
        "tokenizer_digest": str,
        "rows": int,
        "tokens": int,
        "fill_rate": float,
        "documents": int,
        "records": {"read": int, "kept": int, "filtered": int, "quarantined": int},
        "filtered": {"*": int},
        "quarantined": {"*": int},
        "token_counts": {"text": int, "eos": int, "rows": int, "*": int},
        "sources": [{"name": str, "kind": str, "shards": int}],
        "shards": [_SHARD],
        "files": [_FILE],
    },
    "content_digest": str,
    "run": dict,
}
_CHAT = {
    "template": {"source": str, "with_tools": str, "tokens": {"*": str}, "date": (str, type(None))},
    "counts": {"examples": int, "turns": int, "*": int},
}
"""Of `content.chat`, which only conversations have."""
_STEPS = [list]
"""[step, number, "left" or "lost"], in order."""
_ENTITY_COREF = {
    "content": {
        "format_version": int,
        "recipe": str,
        "config": {"mode": str, "max_entity_freq": int},
        "seq_len": int,
        "tokenizer": {"tokenizer_sha256": str, "mask_id": int},
        "rows": int,
        "documents": int,
        "split": {"train": int, "validation": int},
        "funnel": _STEPS,
        "mentions": _STEPS,
        "entities": {"unique": int, "top": [list]},
        "kiwi": dict,
        **dict.fromkeys(
            ("entity_length_stats", "distance_stats", "distance_distribution", "length_stats", "masked_tokens_stats"),
            dict,
        ),
        "sources": [{"name": str, "kind": str, "shards": int}],
        "shards": [{"file": str, "rows": int, "bytes": int, "xxh3_128": str, "shard_key": str}],
        "files": [_FILE],
    },
    "content_digest": str,
    "run": {"created": str, "plan_key": str, "plan": {"files": dict}},
}

FORMATS = {
    PRETRAINING: Format(2, _PRETRAINING, "python -m moai prepare"),
    ENTITY_COREF: Format(
        2, _ENTITY_COREF, "python -m moai entity-coref", ("train", "validation"), frozenset({"metadata.json"})
    ),
}


def misfits(manifest: Mapping[str, Any], recipe: str) -> Iterator[str]:
    """Where a manifest has not the shape of its recipe, in words."""
    yield from _misfits(manifest, FORMATS[recipe].shape, "")
    if recipe == PRETRAINING and isinstance(manifest, dict) and "chat" in (manifest.get("content") or ()):
        yield from _misfits(manifest["content"]["chat"], _CHAT, "content.chat")


def _misfits(value: Any, shape: Any, place: str) -> Iterator[str]:
    """Where `value` is not as `shape` says, in words."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place or 'the top'} is no object"
            return
        for name, inner in shape.items():
            if name == "*":
                for key, entry in value.items():
                    yield from _misfits(entry, inner, f"{place}.{key[:40]}")
            elif name not in value:
                yield f"{place}.{name} is absent".lstrip(".")
            else:
                yield from _misfits(value[name], inner, f"{place}.{name}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for index, entry in enumerate(value):
            yield from _misfits(entry, shape[0], f"{place}[{index}]")
    elif isinstance(shape, frozenset):
        if not isinstance(value, str) or value not in shape:
            yield f"{place} is {str(value)[:40]!r}"
    elif isinstance(value, bool) or not isinstance(value, shape):
        yield f"{place} is {str(value)[:40]!r}"
    elif isinstance(value, int | float) and value < 0:
        yield f"{place} is {value}"
