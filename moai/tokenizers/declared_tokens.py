"""Tokens that the files beside a tokenizer.json declare: transformers adds those that it lacks, and ids would differ.

Which file counts is as in transformers 5: `added_tokens_decoder` of tokenizer_config.json, or else
special_tokens_map.json and added_tokens.json; in either case every token that the configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Declared:
    """A token, the file that declares it, and its flags where transformers takes them from there."""

    content: str
    place: str
    flags: tuple[bool, ...] | None = None


def lacking(file: Path, tokenizer: Any) -> list[Declared]:
    """What transformers would add to the library's tokenizer of this tokenizer.json, or change in it."""
    there = {
        token.content: tuple(getattr(token, flag) for flag in _FLAGS)
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    found: dict[str, Declared] = {}
    for token in _declared(file):
        if token.content and (token.content not in there or token.flags not in (None, there[token.content])):
            found.setdefault(token.content, token)
    return list(found.values())


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _declared(file: Path) -> Iterator[Declared]:
    config = read(file.with_name("tokenizer_config.json"))
    yield from _named(config, "tokenizer_config.json")
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        for token in decoder.values():
            if isinstance(token, dict):
                normalized = token.get("normalized")
                plain = (bool(token.get(flag)) for flag in _FLAGS[:-1])
                flags = (*plain, not token.get("special") if normalized is None else bool(normalized))
                yield Declared(_content(token), "tokenizer_config.json", flags)
        return
    yield from _named(read(file.with_name("special_tokens_map.json")), "special_tokens_map.json")
    yield from (Declared(content, "added_tokens.json") for content in read(file.with_name("added_tokens.json")))


def _named(config: dict[str, Any], place: str) -> Iterator[Declared]:
    """Tokens under names of their own, as eos_token or image_token, and those of the lists."""
    for name, value in config.items():
        if name.endswith("_token"):
            yield Declared(_content(value), place)
        elif name in _LISTS and isinstance(value, list | dict):
            values = value.values() if isinstance(value, dict) else value
            yield from (Declared(_content(one), place) for one in values)


def _content(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
