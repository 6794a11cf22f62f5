"""The shipped documents, and tokenizers of every shape."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizer_shapes import BOS, EOS, REFUSED, ROOT, VARIANTS, WRONG, Shape, demo_documents, train


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return demo_documents()


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Shape:
    """`shape(name)`: the folder of a tokenizer, trained or changed when it is first asked for."""
    folder = tmp_path_factory.mktemp("tokenizers")
    changed = VARIANTS | WRONG | REFUSED

    @cache
    def made(name: str) -> Path:
        if name == "demo":
            return ROOT / "tokenizers" / "demo"
        if name in changed:
            base, change = changed[name]
            value = json.loads((made(base) / "tokenizer.json").read_bytes())
            change(value)
            return write(value)
        return write(json.loads(train(name, documents).to_str()), eos="[SEP]" if name == "wordpiece" else EOS)

    def write(value: dict[str, Any], eos: str = EOS) -> Path:
        path = folder / str(len(list(folder.iterdir())))
        path.mkdir()
        (path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": eos, "bos_token": BOS if eos == EOS else "[CLS]"})
        )
        return path

    return made
