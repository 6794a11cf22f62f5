"""The corpus end to end in this process: what is in it, what is refused, what is reused, and that it does not hang on
batches or modes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from coref_corpus import byte_level, contents, failing, news, rows, wordpiece, write

from moai import coref as entity_coref
from moai.cache.shards import regroup
from moai.core.config import resolve
from moai.core.errors import ConfigError, SourceError, TokenizerError, TooManyBadRecords
from moai.coref import publishing
from moai.coref.korean import RULES
from moai.coref.manifest import read_manifest
from moai.coref.mlm_tokens import load_mlm_tokenizer
from moai.coref.options import CorefConfig
from moai.coref.samples import IGNORED
from moai.tokenizers.backends import Reference

Run = Callable[..., Path]
DOCUMENTS = [news(seed) for seed in range(12)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"wordpiece": wordpiece(folder / "wp"), "byte_level": byte_level(folder / "bl", tokenizer_dir)}


@pytest.fixture
def run(tmp_path: Path, models: dict[str, Path]) -> Run:
    """`run(file, seq_len=..., model="byte_level", ...)`: prepare in this process, under this test's folder."""

    def prepare(*files: Path, model: str = "wordpiece", **options: Any) -> Path:
        given: dict[str, Any] = {"num_workers": 0, "output_dir": str(tmp_path / "out"), **options}
        return entity_coref.prepare(
            CorefConfig(input=tuple(map(str, files)), model=str(models[model]), **given),
            origins={"num_workers": "flag"},
        )

    return prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """12 documents that pass, and one or two for each rule."""
    others = [failing(rule, seed) for rule in RULES[1:] for seed in range(1 + (rule in ("nnp", "length")))]
    return write(tmp_path / "news.jsonl", [*DOCUMENTS[:6], *others, *DOCUMENTS[6:]])


@pytest.mark.parametrize("model", ["wordpiece", "byte_level"])
@pytest.mark.parametrize("seq_len", [256, 2048])
def test_every_sample_asks_for_its_name_and_shows_the_antecedent(
    run: Run, corpus: Path, models: dict[str, Path], model: str, seq_len: int
) -> None:
    path = run(corpus, model=model, seq_len=seq_len)
    assert path.name == f"entity_coref_v2_{seq_len}"
    tokenizer = load_mlm_tokenizer(str(models[model]))
    decode = Reference(spec=tokenizer.spec).decode
    samples = list(rows(path))
    assert len(samples) >= 80
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"]
        masked = [place for place, label in enumerate(labels) if label != IGNORED]
        assert masked
        assert masked == list(range(masked[0], masked[-1] + 1))
        assert {place for place, token in enumerate(ids) if token == tokenizer.mask_id} >= set(masked)
        begin, end = sample["antecedent_begin"], sample["antecedent_end"]
        assert begin < end <= masked[0]
        target = sample["target"].replace(" ", "")
        assert target in decode(ids[begin:end]).replace(" ", "").replace("##", "")
        label = decode([labels[place] for place in masked]).strip().replace(" ", "").replace("##", "")
        assert label == target  # the name and nothing of its particle
        assert sample["span_exact"]
        shown = decode(ids).replace(" ", "").replace("##", "")
        assert shown.count(target) == 1  # only the antecedent tells
        assert 0.2 <= sample["difficulty"] <= 1
        assert len(ids) == len(labels) == len(sample["attention_mask"]) == len(sample["token_type_ids"]) <= seq_len
        assert (tuple(ids[: len(tokenizer.prefix)]), tuple(ids[len(ids) - len(tokenizer.suffix) :])) == (
            tokenizer.prefix,
            tokenizer.suffix,
        )
        number = int(sample["doc_id"].removeprefix("doc-"))
        text = failing("pronoun") if number == 13 else DOCUMENTS[number if number < 6 else number - 8]
        assert all(text.startswith(sample["target"], sample[place]) for place in ("antecedent_pos", "coref_pos"))
        assert sample["coref_pos"] - sample["antecedent_pos"] == sample["distance"] >= 10


@pytest.mark.parametrize(("rules", "pronoun"), [("mention", 0), ("v2", 1)])
def test_the_counters_name_every_document(run: Run, corpus: Path, rules: str, pronoun: int) -> None:
    content = read_manifest(run(corpus, rules=rules))["content"]
    found = {name: number for name, number, _ in content["funnel"]}
    assert [found[f"{place} {rule}"] for place, rule in enumerate(RULES) if place] == [2, 1, 1, 1, 2, pronoun]
    assert (found["read"], found["errors"], found["passed"]) == (20, 0, 13 - pronoun)
    steps = [name for name, _, _ in content["funnel"]]
    assert (
        steps[2:9]
        == [
            *(f"{place} {rule}" for place, rule in enumerate(RULES) if 0 < place < 5),
            "passed the cheap rules",
            "5 nnp",
            "6 pronoun",
        ][:7]
    )
    assert found["passed the cheap rules"] == 20 - 5
    assert content["alone"] == {
        **dict.fromkeys(RULES, 1),
        "source": 0,
        "length": 2,
        "nnp": 2,
        "hangul": 1,
        "pronoun": pronoun,
    }
    left = {name: number for name, number, what in content["mentions"] if what == "left"}
    lost = sum(number for _, number, what in content["mentions"] if what == "lost")
    assert left["later mentions"] - lost == left["samples"] == content["rows"]


def test_a_run_that_loses_a_document_is_not_published(run: Run, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(self: Any, batches: Any) -> Any:
        yield from (batch.slice(1) for batch in batches)

    monkeypatch.setattr("moai.coref.korean.CheapRules.__call__", lose)
    with pytest.raises(AssertionError, match="documents read: 20"):
        run(corpus)
    assert not (corpus.parent / "out" / "entity_coref_v2_2048").exists()


def test_bytes_do_not_depend_on_batches_or_on_how_samples_wait(
    run: Run, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = contents(run(corpus, output_dir=str(corpus.parent / "a"), shard_bytes=9000))
    assert len([name for name in first if name.endswith(".arrow")]) == 2  # of either split one
    monkeypatch.setattr("moai.coref.samples.ROWS_PER_BATCH", 256)
    for number, size in enumerate((1, 3, 50)):
        monkeypatch.setattr("moai.coref.assembly._DOCUMENTS_PER_BATCH", size)
        other = contents(
            run(corpus, output_dir=str(corpus.parent / f"b{number}"), shard_bytes=9000, tokenizer_batch_size=7)
        )
        assert other == first


@pytest.mark.parametrize("sizes", [(1,) * 23, (7, 9, 7), (23,), (4, 4, 4, 4, 4, 3)])
def test_files_do_not_tell_how_their_rows_came(sizes: tuple[int, ...]) -> None:
    """Neither in where batches end nor in the padding behind a batch's buffers."""
    values = [{"name": f"n{number}", "ids": list(range(number % 5)), "flag": number % 3 == 0} for number in range(23)]
    schema = pa.schema([("name", pa.string()), ("ids", pa.list_(pa.int32())), ("flag", pa.bool_())])

    def written(table: pa.Table, pieces: tuple[int, ...]) -> bytes:
        starts = [sum(pieces[:index]) for index in range(len(pieces))]
        batches = (table.slice(start, size).combine_chunks().to_batches()[0] for start, size in zip(starts, pieces))
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, schema) as writer:
            for batch in regroup(batches, 4):
                writer.write_batch(batch)
        return out.getvalue().to_pybytes()

    table = pa.Table.from_pylist(values, schema=schema)
    assert written(table, sizes) == written(pa.Table.from_pylist(values, schema=schema), (23,))
    assert [batch.num_rows for batch in regroup(iter(table.to_batches(max_chunksize=3)), 4)] == [4, 4, 4, 4, 4, 3]
    separate = b"".join(
        batch.serialize().to_pybytes()
        for start in range(0, 23, 4)
        for batch in pa.Table.from_pylist(values[start : start + 4], schema=schema).to_batches()
    )
    assert b"".join(batch.serialize().to_pybytes() for batch in regroup(iter(table.to_batches()), 4)) == separate


def test_where_shards_are_cut_changes_no_sample(run: Run, corpus: Path) -> None:
    whole = list(rows(run(corpus, output_dir=str(corpus.parent / "a"), max_entity_freq=3)))
    cut = list(
        rows(run(corpus, output_dir=str(corpus.parent / "b"), max_entity_freq=3, shard_bytes=4000, token_chunk_size=5))
    )
    assert whole == cut
    assert len(list((corpus.parent / "b" / "entity_coref_v2_2048").glob("*/data-*"))) > 3


def test_the_order_of_documents_does_not_matter_to_the_cap(run: Run, tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", DOCUMENTS).read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.jsonl").write_text("".join(reversed(lines)))
    results = [
        {
            json.dumps(sample, sort_keys=True)
            for sample in rows(run(file, output_dir=str(tmp_path / name), max_entity_freq=2))
        }
        for name, file in (("x", tmp_path / "a.jsonl"), ("y", tmp_path / "b" / "a.jsonl"))
    ]
    assert results[0] == results[1]
    assert max(Counter(json.loads(sample)["target"] for sample in results[0]).values()) == 2


def test_cap_and_max_samples_are_exact_and_change_no_candidate(
    run: Run, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = Counter(sample["target"] for sample in rows(run(corpus, output_dir=str(corpus.parent / "a"))))
    assert max(every.values()) > 3
    for policy in ("hash", "first"):
        caplog.clear()
        with caplog.at_level("INFO"):
            path = run(
                corpus,
                output_dir=str(corpus.parent / policy),
                cache_dir=str(corpus.parent / "a" / "cache_entity_coref"),
                max_entity_freq=3,
                cap_policy=policy,
            )
        assert Counter(sample["target"] for sample in rows(path)) == Counter(
            {name: min(3, number) for name, number in every.items()}
        )
        assert "샤드: 2개 새로 만듦, 1개 재사용" in caplog.text  # Kiwi did not run again
    assert read_manifest(run(corpus, output_dir=str(corpus.parent / "m"), max_samples=7))["content"]["rows"] == 7


def test_the_split_is_by_document_and_cluster(run: Run, tmp_path: Path) -> None:
    from datasets import load_from_disk

    copies = [f"\n{text}\n무단 전재 금지." for text in DOCUMENTS]
    file = write(tmp_path / "a.jsonl", [*DOCUMENTS, *copies])  # each text under two names
    path = run(file, validation_ratio=0.5)
    sides: dict[str, set[str]] = {}
    for split, samples in load_from_disk(str(path)).items():
        for sample in samples:
            sides.setdefault(sample["doc_id"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "validation"}
    assert all(sides[f"doc-{number}"] == sides[f"doc-{number + 12}"] for number in range(12))
    split = read_manifest(path)["content"]["split"]
    assert split == {name: len(samples) for name, samples in load_from_disk(str(path)).items()}


def test_mode_single_and_the_prior_textual_form(run: Run, corpus: Path, models: dict[str, Path]) -> None:
    mask = load_mlm_tokenizer(str(models["wordpiece"])).mask_id
    single = list(rows(run(corpus, output_dir=str(corpus.parent / "s"), mode="single", mask="one")))
    assert {sample["target"] for sample in single} <= {"서울", "독일"}  # of one token
    assert all(sample["input_ids"].count(mask) == 1 for sample in single)
    textual = list(rows(run(corpus, output_dir=str(corpus.parent / "t"), mode="text")))
    assert len(textual) > len(single) > 0
    decode = Reference(spec=load_mlm_tokenizer(str(models["wordpiece"])).spec).decode
    for sample in textual:
        assert sample["input_ids"].count(mask) == 1
        assert set(sample["labels"]) == {IGNORED}  # which is why the prior corpus trained no coreference
        antecedent = decode(sample["input_ids"][sample["antecedent_begin"] : sample["antecedent_end"]])
        assert sample["target"].replace(" ", "") in antecedent.replace(" ", "")


def test_datasets_opens_it_with_the_columns_promised(run: Run, corpus: Path) -> None:
    from datasets import concatenate_datasets, load_from_disk

    splits = load_from_disk(str(run(corpus)))
    assert list(splits) == ["train", "validation"]
    dataset = concatenate_datasets(list(splits.values()))
    dtypes = {name: getattr(feature, "feature", feature).dtype for name, feature in dataset.features.items()}
    assert dtypes == {
        "input_ids": "int32",
        "attention_mask": "int8",
        "token_type_ids": "int8",
        "labels": "int32",
        "target": "string",
        "antecedent_pos": "int32",
        "coref_pos": "int32",
        "distance": "int32",
        "antecedent_begin": "int32",
        "antecedent_end": "int32",
        "span_exact": "bool",
        "kind": "string",
        "competitors": "int32",
        "difficulty": "float32",
        "nearest": "string",
        "frequent": "string",
        "doc_id": "string",
        "source": "string",
    }
    assert dataset[0]["source"] == "news.jsonl"
    metadata = json.loads((corpus.parent / "out" / "entity_coref_v2_2048" / "metadata.json").read_text())
    assert (metadata["dataset_type"], metadata["num_samples"], metadata["seq_len"]) == (
        "entity_coreference_v2",
        len(dataset),
        2048,
    )
    assert sum(metadata["distance_distribution"].values()) == len(dataset)
    assert metadata["distance_stats"]["min"] == min(dataset["distance"])
    ordered = sorted(dataset["distance"])
    assert metadata["distance_stats"]["median"] == (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def test_the_files_of_the_corpus_are_the_shards_themselves(run: Run, corpus: Path) -> None:
    path = run(corpus)
    assert all(file.stat().st_nlink == 2 for file in path.glob("*/data-*.arrow"))  # links: no second copy
    assert list((corpus.parent / "out" / "cache_entity_coref" / "attempts").iterdir()) == []


def test_documents_without_a_name_of_their_own_are_called_by_their_text(run: Run, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"document": text}, ensure_ascii=False) + "\n" for text in DOCUMENTS[:3]))
    pq.write_table(pa.table({"id": [7, 8, 9], "document": DOCUMENTS[:3]}), tmp_path / "table.parquet")
    unnamed = {sample["doc_id"] for sample in rows(run(lines, output_dir=str(tmp_path / "a")))}
    assert len(unnamed) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in unnamed)
    assert {sample["doc_id"] for sample in rows(run(tmp_path / "table.parquet", output_dir=str(tmp_path / "b")))} == {
        "7",
        "8",
        "9",
    }


# --- what is refused, and what stays ----------------------------------------------------------------------------------


def test_what_hplt_says_of_its_documents_is_heard(run: Run, tmp_path: Path) -> None:
    def hplt(number: int, **said: Any) -> str:
        usual = {"filter": "keep", "doc_scores": [8.0, 10], "pii": [], "id": str(number), "text": DOCUMENTS[number]}
        return json.dumps({**usual, **said}, ensure_ascii=False) + "\n"

    folder = tmp_path / "HPLT" / "kor_Hang"  # one configuration of a Hub dataset, as a partial download leaves it
    folder.mkdir(parents=True)
    card = "---\nlicense: cc0-1.0\nconfigs:\n- config_name: eng_Latn\n  data_files: eng_Latn/*.jsonl\n---\n"
    (tmp_path / "HPLT" / "README.md").write_text(card)
    odd = ({"filter": "adult"}, {"doc_scores": [4.9]}, {"pii": [[3, 9]]})
    (folder / "1.jsonl").write_text("".join([hplt(0), hplt(1), *(hplt(2 + at, **one) for at, one in enumerate(odd))]))
    spec = f"{tmp_path / 'HPLT'}:kor_Hang@train"
    content = read_manifest(run(Path(spec)))["content"]
    assert content["funnel"][2] == ["0 source", 3, "lost"]
    assert content["sources"][0]["license"] == "cc0-1.0"
    kept = run(Path(spec), output_dir=str(tmp_path / "b"), pii="keep", min_doc_score=0.0)
    assert read_manifest(kept)["content"]["funnel"][2][1] == 1
    assert "| cc0-1.0 |" in (kept / "README.md").read_text()


def test_a_part_of_air_bench_is_read_without_its_card(run: Run, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "qa_news_ko" / "AIR-Bench_24.05"
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"id": ["a", "b"], "text": DOCUMENTS[:2]}), folder / "corpus_default-00000-of-00001.parquet"
    )
    pq.write_table(pa.table({"id": ["q"], "text": ["누구인가?"]}), folder / "queries_default-00000-of-00001.parquet")
    content = read_manifest(run(Path(f"{folder.parent}:AIR-Bench_24.05@corpus_default")))["content"]
    assert content["funnel"][0] == ["read", 2, "left"]


def test_max_documents_ends_behind_the_shard_that_holds_as_many(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", DOCUMENTS)
    sizes = {}
    for most in (1, 5, 99):
        path = run(file, output_dir=str(tmp_path / str(most)), max_documents=most, shard_bytes=9000)
        sizes[most] = read_manifest(path)["content"]["funnel"][0][1]
    assert 1 <= sizes[1] < sizes[5] < sizes[99] == 12
    assert sizes[5] >= 5


def test_no_samples_ends_with_the_funnel(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no sample could be made: read 2, .*1 length 2.*widen") as caught:
        run(write(tmp_path / "short.jsonl", [failing("length"), failing("length", 1)]))
    assert caught.value.exit_code != 0
    with pytest.raises(
        SourceError, match=r"with a sample to give 0; mentions skipped: more \d+, window \d+; .*raise --seq-len"
    ):
        run(write(tmp_path / "long.jsonl", DOCUMENTS[:2]), seq_len=12)


def test_a_tokenizer_that_cannot_spell_names_is_refused_before_any_work(
    run: Run, tmp_path: Path, models: dict[str, Path]
) -> None:
    from tokenizers import Tokenizer, normalizers

    uncased = Tokenizer.from_file(str(models["wordpiece"] / "tokenizer.json"))
    uncased.normalizer = normalizers.BertNormalizer(lowercase=True)  # which takes syllables apart
    (tmp_path / "uncased").mkdir()
    uncased.save(str(tmp_path / "uncased" / "tokenizer.json"))
    models["uncased"] = tmp_path / "uncased"
    with pytest.raises(TokenizerError, match=r"12 of 12 common Korean names .*\(한국은행, 서울, 부산\).*--convert"):
        run(write(tmp_path / "a.jsonl", DOCUMENTS[:1]), model="uncased")
    assert not (tmp_path / "out" / "cache_entity_coref" / "shards").exists()


def test_a_second_run_finds_it_and_another_is_refused_or_set_aside(
    run: Run, corpus: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moai.core.files._RACY_NS", 0
    )  # stamps of the last two seconds prove nothing, and everything would be looked at again
    path = run(corpus)
    before = contents(path)
    with caplog.at_level("INFO"):
        assert run(corpus) == path
    assert "바뀐 것이 없습니다" in caplog.text
    with pytest.raises(ConfigError, match=r"other settings or data \(max_entity_freq 1000 -> 2\).*--replace"):
        run(corpus, max_entity_freq=2)
    assert contents(path) == before
    run(corpus, max_entity_freq=2, replace=True)
    (aside,) = path.parent.glob("entity_coref_v2_2048.replaced-*")
    assert contents(aside) == before
    assert contents(path) != before
    run(corpus, max_entity_freq=2, rehash=True)  # the same content: it stays
    assert len(list(path.parent.glob("entity_coref_v2_2048*replaced*"))) == 1


def test_something_else_that_stands_there_is_not_touched(run: Run, corpus: Path) -> None:
    there = corpus.parent / "out" / "entity_coref_v2_2048"
    there.mkdir(parents=True)
    (there / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is none of moai's"):
        run(corpus)
    assert [path.name for path in there.iterdir()] == ["notes.txt"]


def test_broken_records_are_set_aside_with_their_place_until_there_are_too_many(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", DOCUMENTS)
    file.write_text(file.read_text() + '{"id": 1}\nno json\n')
    path = run(file)
    found = [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in found] == [13, 14]
    assert read_manifest(path)["content"]["funnel"][1] == ["errors", 2, "lost"]
    file.write_text(file.read_text() + "no json\n" * 20)
    with pytest.raises(TooManyBadRecords, match="22 of 34"):
        run(file, output_dir=str(tmp_path / "b"))


def test_a_document_on_which_kiwi_fails_is_an_error_with_its_class(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moai.coref import candidates as coref_candidates
    from moai.coref import korean

    class Failing:
        def tokenize(self, text: str) -> Any:
            if text == DOCUMENTS[1]:
                raise RuntimeError("no analysis")
            return korean.analyser("cong").tokenize(text)

    monkeypatch.setattr(coref_candidates, "analyser", lambda model: Failing())
    content = read_manifest(run(write(tmp_path / "a.jsonl", DOCUMENTS[:3])))["content"]
    assert content["errors"] == {"Kiwi: RuntimeError": 1}
    assert content["documents"] == 2


def test_wrong_options_name_themselves() -> None:
    for options, message in (
        ({"min_length": 9, "max_length": 8}, "min_length = 9 is above max_length = 8"),
        ({"max_samples": 0}, "max_samples = 0"),
        ({"sources": ("hplt3",)}, "'hplt3' is none of"),
        ({"validation_ratio": 2.0}, "validation_ratio = 2.0"),
        ({"entity_tags": ()}, "entity_tags is empty"),
        ({"num_workers": -1}, "num_workers = -1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            CorefConfig(**options)
    flags = ["--entity-tags", "NNP,NNG", "--sources", "hplt", "naver_news", "--no-pronoun-filter"]
    given = resolve([CorefConfig], flags, {}, prog="test")[CorefConfig]
    assert (given.entity_tags, given.sources, given.pronoun_filter) == (("NNP", "NNG"), ("hplt", "naver_news"), False)
    assert [spec.split("/")[0] for spec, _ in CorefConfig().inputs] == [
        "dev7halo",
        "HPLT",
        "AIR-Bench",
        "nmixx-fin",
        "nmixx-fin",
    ]
    assert CorefConfig(input=("a",), sources=("hplt",), text_column="body").inputs == (
        ("a", "body"),
        ("HPLT/HPLT2.0_cleaned:kor_Hang@train", "text"),
    )


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_funnel_names_and_samples(run: Run, corpus: Path, models: dict[str, Path]) -> None:
    path = run(corpus, report_samples=9)
    decode = Reference(spec=load_mlm_tokenizer(str(models["wordpiece"])).spec).decode
    whole = {
        decode([token if label == IGNORED else label for token, label in zip(sample["input_ids"], sample["labels"])])
        for sample in rows(path)
    }
    page = (path / "report.html").read_text()
    assert page.count("<article>") == 9
    assert "http" not in page  # self-contained
    for article in re.findall(r"<article>.*?</article>", page, re.DOTALL):
        target = re.search(r"· ([^·]+) · \d", article)
        [antecedent], [mask] = (
            re.findall(rf"<mark class={kind}>(.*?)</mark>", article) for kind in ("antecedent", "mask")
        )
        assert target
        shown = re.search("<p>(.*)</p>", article, re.DOTALL)
        assert shown
        assert re.sub("<[^>]*>", "", shown[1]) in whole
        assert target[1].replace(" ", "") in antecedent.replace(" ", "")
        assert target[1].replace(" ", "") == mask.replace(" ", "")
    content = read_manifest(path)["content"]
    for name, number, _ in [*content["funnel"], *content["mentions"]]:
        assert f"<td class=name>{name}</td><td class=number>{number:,}</td>" in page
    assert all(f"<td class=name>{name}</td>" in page for name, _ in content["entities"]["top"])


def test_the_conservation_check_sees_each_kind_of_loss(run: Run, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[publishing.Corpus] = []
    checked = publishing.check_conservation
    monkeypatch.setattr(publishing, "check_conservation", lambda corpus: (seen.append(corpus), checked(corpus)))
    run(corpus)
    true = seen[0].counts
    for name in ("read", "filtered.rule.hangul", "quarantined", "mentions", "candidates", "samples", "skipped.pronoun"):
        changed = true + Counter({name: 1})
        monkeypatch.setattr(publishing.Corpus, "counts", property(lambda self, changed=changed: changed))
        with pytest.raises(AssertionError, match="sum to"):
            checked(seen[0])
