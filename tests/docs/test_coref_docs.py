"""docs/entity-coref.md: its commands parse, its tables hold every flag with its default, and the Korean page says the
same.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import ROOT, anchors, commands, fences, flag_rows, headings, prose, tables

from moai.core.config import parse_size, resolve
from moai.coref.mlm_evaluate import EvaluateConfig
from moai.coref.mlm_finetune import FinetuneConfig
from moai.coref.options import CorefConfig
from moai.coref.samples import SCHEMA

ENGLISH, KOREAN = ROOT / "docs" / "entity-coref.md", ROOT / "docs" / "ko" / "entity-coref.md"
CONFIGS = (CorefConfig, FinetuneConfig, EvaluateConfig)
PROGRAMS = {
    ("python", "scripts/prepare_entity_coref_v2.py"): CorefConfig,
    ("python", "-m", "moai", "entity-coref"): CorefConfig,
    ("python", "scripts/run_entity_coref_finetune.py"): FinetuneConfig,
    ("python", "scripts/evaluate_entity_coref.py"): EvaluateConfig,
}


def test_every_command_parses_and_its_files_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(ENGLISH)
    assert len(found) == 5
    for command in found:
        words = tuple(shlex.split(command))
        start, cls = next((start, cls) for start, cls in PROGRAMS.items() if words[: len(start)] == start)
        resolve([cls], words[len(start) :], {}, prog="test")
        assert all((ROOT / path).exists() for path in re.findall(r"(?:configs|data|scripts)/[\w./-]+", command))


@pytest.mark.parametrize("document", [ENGLISH, KOREAN], ids=["en", "ko"])
def test_every_flag_is_in_a_table_with_its_default_and_its_star(document: Path) -> None:
    shown = flag_rows(document)
    of: dict[type, dict[str, tuple[str, bool]]] = {cls: {} for cls in CONFIGS}
    raw = [row for row in tables(document) if len(row) == 3 and row[0].startswith("`--")]
    which = iter(CONFIGS)
    cls = next(which)
    for (flags, default), row in zip(shown, raw, strict=True):
        names = [flag.replace("-", "_") for flag in flags]
        if names[0] == "checkpoint":
            cls = next(which)
        for name, value in zip(names, default.split(", ") if len(names) > 1 else [default], strict=True):
            of[cls][name] = (value.strip("`"), " *" in row[0])
    for cls in CONFIGS:
        assert set(of[cls]) == {field.name for field in dataclasses.fields(cls)}
        for field in dataclasses.fields(cls):
            text, star = of[cls][field.name]
            assert star is bool(field.metadata["affects_output"]), field.name
            if text:
                assert like(text, field.default) == field.default, field.name


def like(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return {"true": True, "false": False}[text]
    if isinstance(default, int):
        return parse_size(text) if text.endswith("B") else int(text)
    return float(text) if isinstance(default, float) else text


@pytest.mark.parametrize("document", [ENGLISH, KOREAN], ids=["en", "ko"])
def test_every_column_flag_and_link_is_there(document: Path) -> None:
    named = {word for row in tables(document) for word in re.findall(r"`(\w+)`", row[0])}
    assert set(SCHEMA.names) <= named
    known = {f"--{field.name.replace('_', '-')}" for cls in CONFIGS for field in dataclasses.fields(cls)} | {
        "--config",
        "--no-pronoun-filter",
        "--full",
        "--html",
        "--samples",
    }
    mentioned = {
        flag
        for span in re.findall(r"`([^`]+)`", prose(document))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
    }
    assert mentioned <= known
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        assert (document.parent / path).is_file()
        assert not anchor or anchor in anchors(document.parent / path)
    assert re.findall(r"(?<![\w.~…])/(?:work|tmp|root|home)\b\S*", document.read_text()) == []


def test_both_languages_say_the_same() -> None:
    assert [heading.split()[0] for heading in headings(ENGLISH)] == [heading.split()[0] for heading in headings(KOREAN)]
    assert commands(ENGLISH) == commands(KOREAN)
    assert [info for info, _ in fences(ENGLISH)] == [info for info, _ in fences(KOREAN)]
    assert [len(row) for row in tables(ENGLISH)] == [len(row) for row in tables(KOREAN)]
    assert sorted(re.findall(r"\d[\d,.]*\d", prose(ENGLISH))) == sorted(re.findall(r"\d[\d,.]*\d", prose(KOREAN)))


def test_the_shipped_configurations_resolve_and_hold_the_defaults() -> None:
    resolved = resolve([CorefConfig], ["--config", str(ROOT / "configs" / "entity_coref_v2.yaml")], {}, prog="test")[
        CorefConfig
    ]
    assert resolved == CorefConfig()
    assert set(yaml.safe_load((ROOT / "configs" / "entity_coref_v2.yaml").read_text())) <= {
        field.name for field in dataclasses.fields(CorefConfig)
    }
    real = resolve([CorefConfig], ["--config", str(ROOT / "configs" / "entity_coref_real.yaml")], {}, prog="test")[
        CorefConfig
    ]
    assert (real.min_length, real.entity_tags, real.max_mentions, real.pronoun_filter) == (100, ("NNP", "NNG"), 1, True)
