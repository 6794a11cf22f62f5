"""Judging a corpus: which documents go, what is made again when a threshold changes, what is said and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moai.cache.gc.collect import GcConfig, collect
from moai.cli import main
from moai.core.errors import ConfigError, DamagedError, SourceError
from moai.engine.part import Map, Signal
from moai.engine.schema import Column
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig
from moai.pretraining.repair import repair
from moai.quality import plain
from moai.quality.rules import PROFILES, RULES, Profile, failures, parse_profile
from moai.quality.statistics import TextStatistics

GOOD = "A sentence of {0} that has enough different words to be kept by every rule number {0}."
LOUD = "# # # # # # {0} # # # #"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents, of which every third is loud; in several shards of 2 kB."""
    path = tmp_path_factory.mktemp("web") / "web.jsonl"
    texts = [(LOUD if number % 3 == 2 else GOOD).format(number) for number in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


Make = Callable[..., Prepared]
RULE: dict[str, Any] = {"quality": {"gopher.max_hashes": 0.1}, "shard_bytes": 2000}


def test_a_document_that_fails_a_rule_goes_and_the_manifest_adds_up(web: Path, prepare: Make, texts: Any) -> None:
    prepared = prepare(str(web), **RULE)
    assert texts(prepared) == [GOOD.format(number) for number in range(120) if number % 3 < 2]
    content = prepared.content
    assert content["records"] == {"read": 120, "kept": 80, "filtered": 40, "quarantined": 0}
    assert content["filtered"] == {"judged": 40}
    assert content["quality"]["sources"]["web.jsonl"]["dropped"] == 40
    assert all(check.ok for check in verify(prepared.path, full=True))
    report = json.loads((prepared.path / "quality.json").read_bytes())
    rule = report["rules"]["gopher.max_hashes"]
    assert (rule["documents"], rule["alone_documents"], sum(rule["histogram"]["documents"])) == (40, 40, 120)


def test_the_directory_tells_of_each_document_what_was_measured_and_which_rules_it_failed(
    web: Path, prepare: Make
) -> None:
    prepared = prepare(str(web), **RULE)
    words, failed = [], []
    for number in range(len(prepared.content["shards"])):
        with pa.memory_map(str(prepared.path / f"signals-{number:05d}-text_statistics.arrow")) as file:
            words += pa.ipc.open_stream(file).read_all()["words"].to_pylist()
        with pa.memory_map(str(prepared.path / f"verdicts-{number:05d}.arrow")) as file:
            failed += pa.ipc.open_file(file).read_all()["failed"].to_pylist()
    bit = 1 << list(RULES).index("gopher.max_hashes")
    assert failed == [bit if number % 3 == 2 else 0 for number in range(120)]
    assert words[:3] == [len(plain.words_of(text.format(n))) for n, text in enumerate((GOOD, GOOD, LOUD))]


def test_workers_batches_and_restarts_change_no_byte(web: Path, prepare: Make, tmp_path: Path) -> None:
    found = {
        prepare(str(web), **RULE, num_proc=num_proc, dataset_batch_size=size, cache_dir=str(tmp_path / name)).path.name
        for name, num_proc, size in (("a", 0, 1000), ("b", 2, 7))
    }
    assert len(found) == 1


def test_another_threshold_measures_nothing_and_packs_only_what_changed(
    web: Path, prepare: Make, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(str(web), **RULE)
    made = {path.name for path in (cache / "shards").iterdir()}
    # One document fails besides: only its shard is packed again.
    alone = {**RULE["quality"], "min_chars": len(GOOD.format(1)) + 2}
    second = prepare(str(web), **{**RULE, "quality": {**RULE["quality"], "gopher.max_words": 10**6}})
    assert {path.name for path in (cache / "shards").iterdir()} == made
    assert second.path != first.path  # another profile is another directory, of the same shards
    caplog.clear()  # another test may have set the level before
    with caplog.at_level("INFO"):
        third = prepare(str(web), **{**RULE, "quality": alone})
    assert third.content["records"]["kept"] < 80
    measured, packed = (line for line in caplog.messages if "100%" in line)
    shards = len(third.content["shards"])
    assert f"{shards} shards ({shards} reused)" in measured
    assert f"{shards} shards ({shards} reused)" not in packed


@dataclass(frozen=True)
class Vowels(Signal):
    needs = ("text",)
    adds = (Column("vowels", "uint32", per="document"),)

    def measure(self, batch: pa.RecordBatch) -> dict[str, list[int]]:
        return {"vowels": [sum(letter in "aeiou" for letter in text) for text in batch["text"].to_pylist()]}


@dataclass(frozen=True)
class Loud(Map):
    needs = ("text",)

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([pa.array(text.upper() for text in batch["text"].to_pylist())], names=["text"])


def test_a_new_signal_or_filter_measures_only_itself_and_a_map_measures_again(
    web: Path, prepare: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(str(web), **RULE)
    measured: list[int] = []
    measure = TextStatistics.measure

    def counting(self: TextStatistics, batch: pa.RecordBatch) -> dict[str, Any]:
        measured.append(batch.num_rows)
        return measure(self, batch)

    monkeypatch.setattr(TextStatistics, "measure", counting)
    vowels = []
    prepared = prepare(str(web), **RULE, transforms=(Vowels(),))
    for number in range(len(prepared.content["shards"])):
        with pa.memory_map(str(prepared.path / f"signals-{number:05d}-vowels.arrow")) as file:
            vowels += pa.ipc.open_stream(file).read_all()["vowels"].to_pylist()
    assert vowels[:3] == [
        sum(letter in "aeiou" for letter in text.format(n)) for n, text in enumerate((GOOD, GOOD, LOUD))
    ]
    shorter = prepare(str(web), **RULE, max_chars=len(GOOD.format(99)))
    assert shorter.content["filtered"] == {"judged": 40, "length.long": 13}
    assert measured == []
    prepare(str(web), **RULE, transforms=(Loud(),))
    assert sum(measured) == 120


def test_a_shard_that_loses_nothing_is_the_one_that_is_packed_without_judging(web: Path, prepare: Make) -> None:
    unjudged = prepare(str(web), shard_bytes=2000)
    judged = prepare(str(web), shard_bytes=2000, quality={"gopher.max_hashes": 1.0})
    assert judged.path != unjudged.path
    keys = [[shard["shard_key"] for shard in one.content["shards"]] for one in (unjudged, judged)]
    assert keys[0] == keys[1]


def test_what_is_held_out_is_judged_too_and_both_sides_are_measured_once(web: Path, prepare: Make, cache: Path) -> None:
    sides = [prepare(str(web), **RULE, eval_ratio=0.3, held_out=held_out) for held_out in (False, True)]
    assert sum(side.content["documents"] for side in sides) == 80
    assert all(side.content["filtered"]["judged"] == 40 for side in sides)
    for name in ("signals-00000.arrow", "signals-00000-text_statistics.arrow"):
        assert len({(side.path / name).stat().st_ino for side in sides}) == 1


def test_a_file_without_a_record_is_warned_of_once(
    web: Path, prepare: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(web.read_bytes())
    (tmp_path / "data" / "b.jsonl").write_text("\n\n")
    prepare(str(tmp_path / "data"), **RULE)
    assert len([line for line in caplog.messages if "hold no record" in line]) == 1


def test_conversations_are_kept_or_dropped_whole(prepare: Make, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": "{}"}]
    lines = [
        {"messages": [turns[0], {**turns[1], "content": content}]} for content in ("# # # # #", "A plain answer to it.")
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    template = str(Path(__file__).parents[2] / "configs" / "chat_template_demo.jinja")
    prepared = prepare(
        str(tmp_path / "chat.jsonl"),
        data_format="chat",
        chat_template=template,
        packing="bfd",
        quality={"gopher.max_hashes": 0.1},
    )
    assert prepared.content["filtered"] == {"judged": 8}
    assert prepared.content["documents"] == 8


def test_more_than_max_dropped_ends_the_run_before_packing(web: Path, prepare: Make, cache: Path) -> None:
    with pytest.raises(
        SourceError, match=r"web.jsonl: 40 of 120 documents are judged away, more than --max_dropped 0.3"
    ):
        prepare(str(web), **RULE, max_dropped=0.3)
    assert not any((cache / "datasets").iterdir())
    assert prepare(str(web), **RULE, max_dropped=0.34).content["documents"] == 80


def test_a_source_has_thresholds_of_its_own(web: Path, prepare: Make, tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_bytes(web.read_bytes())
    profile = {"gopher.max_hashes": 0.1, "sources": {"code.jsonl": {"gopher.max_hashes": False}}}
    prepared = prepare(str(web), str(tmp_path / "code.jsonl"), quality=profile)
    dropped = {name: one["dropped"] for name, one in prepared.content["quality"]["sources"].items()}
    assert dropped == {"web.jsonl": 40, "code.jsonl": 0}


def test_gc_leaves_what_a_judged_directory_was_measured_by(
    web: Path, prepare: Make, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(str(web), **RULE)
    for _ in collect(GcConfig(cache_dir=str(cache), older_than=0)):
        pass
    caplog.clear()  # another test may have set the level before
    with caplog.at_level("INFO"):
        prepared = prepare(str(web), **{**RULE, "quality": {"gopher.max_hashes": 0.2}})
    shards = len(prepared.content["shards"])
    assert f"{shards} shards ({shards} reused)" in next(line for line in caplog.messages if "100%" in line)
    for directory in (cache / "datasets").iterdir():
        shutil.rmtree(directory)
    for _ in collect(GcConfig(cache_dir=str(cache), older_than=0)):
        pass
    assert not any((cache / "shards").iterdir())


@pytest.mark.parametrize(
    "changes",
    [RULE, {**RULE, "dedup": "exact", "pii": "mask"}, {**RULE, "eval_ratio": 0.3, "held_out": True}],
    ids=["rules", "copies and mask", "held out"],
)
def test_a_judged_directory_is_repaired_without_a_cache(
    web: Path, prepare: Make, cache: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(web.read_bytes() * 2 + json.dumps({"text": "Ask a@b.com about it."}).encode() + b"\n")
    alone = tmp_path / "alone"
    shutil.copytree(prepare(str(path), **changes).path, alone)
    shutil.rmtree(cache)
    lost = [*sorted(alone.glob("data-*.arrow"))[:2], alone / "documents-00001.arrow"]
    kept = [one.read_bytes() for one in lost]
    for one in lost:
        one.unlink()
    list(repair(alone))
    assert [one.read_bytes() for one in lost] == kept
    assert all(check.ok for check in verify(alone, full=True))
    lost[0].unlink()
    (alone / "verdicts-00000.arrow").unlink()
    with pytest.raises(DamagedError, match=r"verdicts-00000.arrow: damaged"):
        list(repair(alone))


def test_the_command_writes_a_page_and_packs_nothing(web: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--dataset", str(web), "--tokenizer_path", "tokenizers/demo", "--cache_dir", str(tmp_path / "cache")]
    judged = ["quality", *flags, "--quality", "gopher", "--quality_set", "gopher.min_words=5"]
    assert main([*judged, "--report", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report/quality.html\n"
    page = (tmp_path / "report" / "quality.html").read_text()
    assert "gopher.min_words" in page
    assert "<script" not in page
    assert not any((tmp_path / "cache" / "datasets").iterdir())
    assert main(["quality", *flags]) == 2
    assert "nothing to judge by: name a profile with --quality" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quality", "changes", "said"),
    [
        ("gofer", (), r"no profile is called 'gofer'; did you mean gopher\?, nor is it a file"),
        ({"gopher.min_word": 3}, (), r"no rule is called 'gopher.min_word'; did you mean gopher.min_words\?"),
        ({"gopher.min_words": "many"}, (), "gopher.min_words = 'many': expected a number, or off"),
        ({"gopher.min_words": float("nan")}, (), "expected a number"),
        ({"extends": "c5"}, (), "extends 'c5', which is none of gopher, fineweb, fineweb2_ko"),
        ({"sources": ["web"]}, (), "sources holds rules by the name of a source"),
        ("gopher", ("gopher.min_words",), "gopher.min_words = '': expected a number, or off"),
        (None, ("gopher.min_words=3",), "quality_set is set and quality is not"),
    ],
)
def test_mistakes_are_named_with_their_place(quality: Any, changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataConfig(quality=quality, quality_set=changes).profile()


def test_a_profile_file_extends_changes_and_switches_off(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: [gopher]\ngopher.min_words: 40\ngopher.min_stop_words: off\n")
    profile = parse_profile("mine.yaml", folder=tmp_path)
    assert isinstance(profile, Profile)
    found = profile.changed(["fineweb.max_newlines=0.3", "gopher.max_hashes=off"]).of("any")
    assert found == {
        name: value
        for name, value in {**PROFILES["gopher"], "gopher.min_words": 40, "fineweb.max_newlines": 0.3}.items()
        if name not in ("gopher.min_stop_words", "gopher.max_hashes")
    }


def test_a_value_on_its_threshold_is_kept() -> None:
    texts = ["word " * 50, "word " * 49]
    numbers = dict(zip(plain.NAMES, pa_columns(texts), strict=True))
    assert failures(numbers, {"gopher.min_words": 50}).tolist() == [0, 1 << list(RULES).index("gopher.min_words")]
    assert failures(numbers, {"gopher.max_words": 50}).tolist() == [0, 0]


def pa_columns(texts: list[str]) -> Any:
    return [pa.array(column, pa.uint32()).to_numpy() for column in zip(*(plain.statistics(text) for text in texts))]
