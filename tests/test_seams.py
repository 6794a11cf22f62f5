"""What a user adds from outside the package, one file each: counts, keys and errors follow without a line of moai's
being touched.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from moai.core.errors import ConfigError, PartFailed
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.prepared.verify import verify
from moai.training.data import PackedCollator
from moai.transforms.named import parse_parts

HEAD = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import pyarrow as pa
from moai import Column, Filter, Map, Signal
"""
LETTERS = """
@dataclass(frozen=True)
class MostlyLetters(Filter):
    needs = ("text",)
    min_share: float = 0.5

    def keep(self, batch):
        return [sum(map(str.isalpha, text)) >= self.min_share * len(text) for text in batch["text"].to_pylist()]
"""
TEXTS = ["letters only", "1 2 3 4 5 6", "half 12345", "가나다라", "!?", "", "  ", "some 1 more", "ab12"]
CHAT_TEMPLATE = Path(__file__).parent.parent / "configs" / "chat_template_demo.jinja"

PrepareIt = Callable[..., Prepared]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`user(code)` writes my_parts.py into a folder that is the working directory, and forgets what was imported of an
    older one.
    """
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(code: str) -> Path:
        (folder / "my_parts.py").write_text(HEAD + code)
        sys.modules.pop("my_parts", None)
        importlib.invalidate_caches()
        return folder

    yield write
    sys.modules.pop("my_parts", None)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "a.jsonl", [{"text": text, "id": number, "url": f"u/{number}"} for number, text in enumerate(TEXTS)]
    )


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok " + text}] for text in TEXTS]
    return write_lines(
        tmp_path / "chat.jsonl", [{"messages": messages, "id": number} for number, messages in enumerate(turns)]
    )


def parts(*words: str) -> tuple[Any, ...]:
    return parse_parts(list(words), place="--transforms")


def mostly(text: str, share: float = 0.5) -> bool:
    return sum(map(str.isalpha, text)) >= share * len(text)


def documents(prepared: Prepared) -> list[dict[str, Any]]:
    paths = sorted(prepared.path.glob("documents-*.arrow"))
    return [row for path in paths for row in pa.ipc.open_file(path).read_all().to_pylist()]


@pytest.mark.parametrize("min_chars", [1, 5])
@pytest.mark.parametrize("num_proc", [0, 2])
def test_a_filter_counts_as_brute_force_does(
    user: Any, prepare: PrepareIt, texts: Any, corpus: Path, min_chars: int, num_proc: int
) -> None:
    user(LETTERS)
    prepared = prepare(
        corpus, min_chars=min_chars, num_proc=num_proc, transforms=parts("my_parts:MostlyLetters: {min_share: 0.5}")
    )
    long_enough = [text for text in TEXTS if len(text.strip()) >= min_chars]
    kept = [text for text in long_enough if mostly(text)]
    assert texts(prepared) == kept
    assert prepared.content["records"] == {
        "read": len(TEXTS),
        "kept": len(kept),
        "filtered": len(TEXTS) - len(kept),
        "quarantined": 0,
    }
    assert prepared.content["filtered"]["mostly_letters"] == len(long_enough) - len(kept)
    assert [row["reason"] for row in documents(prepared)] == [
        f"length.{'short' if text.strip() else 'empty'}"
        if text not in long_enough
        else None
        if text in kept
        else "mostly_letters"
        for text in TEXTS
    ]


@pytest.mark.parametrize("min_chars", [1, 14])
def test_the_same_filter_judges_conversations_by_the_contents_of_their_turns(
    user: Any, prepare: PrepareIt, chats: Path, min_chars: int
) -> None:
    user(LETTERS)
    prepared = prepare(
        chats,
        data_format="chat",
        chat_template=str(CHAT_TEMPLATE),
        min_chars=min_chars,
        transforms=parts("my_parts:MostlyLetters"),
    )
    joined = [f"{text}\nok {text}" for text in TEXTS]
    long_enough = [text for text in joined if min_chars == 1 or len(text.strip()) >= min_chars]
    assert prepared.content["filtered"].get("mostly_letters", 0) == sum(not mostly(text) for text in long_enough) > 0
    assert prepared.content["records"]["kept"] == sum(map(mostly, long_enough))
    assert all(check.ok for check in verify(prepared.path))


def test_messages_are_there_where_a_part_needs_them(user: Any, prepare: PrepareIt, chats: Path) -> None:
    user("""
@dataclass(frozen=True)
class Short(Filter):
    needs = ("messages", "id")

    def keep(self, batch):
        rows = zip(batch["messages"].to_pylist(), batch["id"].to_pylist())
        return [turns[0]["role"] == "user" and number != 3 for turns, number in rows], ["third"]
""")
    prepared = prepare(chats, data_format="chat", chat_template=str(CHAT_TEMPLATE), transforms=parts("my_parts:Short"))
    assert prepared.content["filtered"] == {"short.third": 1}


def test_code_and_fields_are_in_the_key(user: Any, prepare: PrepareIt, corpus: Path, tmp_path: Path) -> None:
    def made(code: str, words: str = "my_parts:MostlyLetters") -> tuple[str, int]:
        user(code)
        prepared = prepare(corpus, transforms=parts(words))
        return prepared.path.name, prepared.content["records"]["kept"]

    first = made(LETTERS)
    assert made(LETTERS) == first
    assert made(LETTERS, "my_parts:MostlyLetters: {min_share: 0.9}") != first
    stricter = made(LETTERS.replace(">=", ">"))
    assert stricter[0] != first[0]
    assert stricter[1] < first[1]
    assert made(LETTERS) == first


def test_a_file_that_a_part_reads_is_in_the_key_by_its_content(user: Any, prepare: PrepareIt, corpus: Path) -> None:
    folder = user("""
@dataclass(frozen=True)
class Without(Filter):
    words: Path
    needs: ClassVar = ("text",)

    def keep(self, batch):
        words = self.words.read_text().split()
        return [not any(word in text for word in words) for text in batch["text"].to_pylist()]
""")
    (folder / "words.txt").write_text("half")
    first = prepare(corpus, transforms=parts("my_parts:Without: {words: words.txt}"))
    (folder / "words.txt").write_text("half 가나")
    assert prepare(corpus, transforms=parts("my_parts:Without: {words: words.txt}")).content["filtered"]["without"] == 2
    assert first.content["filtered"]["without"] == 1


def test_a_raised_version_makes_its_shards_again_and_no_others(
    prepare: PrepareIt, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moai.transforms.filters import Split

    plain, split = prepare(corpus), prepare(corpus, eval_ratio=0.5)
    monkeypatch.setattr(Split, "version", 2)
    again = prepare(corpus, eval_ratio=0.5)
    assert prepare(corpus).content["shards"][0]["shard_key"] == plain.content["shards"][0]["shard_key"]
    assert again.content["shards"][0]["shard_key"] != split.content["shards"][0]["shard_key"]


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("return [True]", r"filter Broken \(my_parts.py\) gave 1 values, not a bool for each of 7 documents"),
        ("return 1 / 0", r"filter Broken \(my_parts.py\) failed in line \d+ \(return 1 / 0\): ZeroDivisionError"),
        (
            "raise NotImplementedError('later')",
            r"filter Broken \(my_parts.py\) failed in line \d+ \(.*\): NotImplementedError: later",
        ),
        ("return super().keep(batch)", r"filter Broken \(my_parts.py\) has no method keep"),
        ("return [1] * batch.num_rows", r"filter Broken \(my_parts.py\) gave values of type int64"),
        ("return [False] * batch.num_rows, ['a']", r"gave 1 reasons for the 7 of 7 documents that it drops"),
        ("return [None] * batch.num_rows", r"gave values of type object"),
    ],
)
@pytest.mark.parametrize("num_proc", [0, 1])
def test_a_broken_filter_is_one_line_and_publishes_nothing(
    user: Any, prepare: PrepareIt, corpus: Path, tmp_path: Path, keep: str, said: str, num_proc: int
) -> None:
    user(
        f"@dataclass(frozen=True)\nclass Broken(Filter):\n    needs = ('text',)\n    def keep(self, batch):\n        "
        f"{keep}\n"
    )
    with pytest.raises(PartFailed, match=said):
        prepare(corpus, transforms=parts("my_parts:Broken"), num_proc=num_proc)
    assert not list((tmp_path / "cache" / "shards").iterdir())
    assert not list((tmp_path / "cache" / "datasets").iterdir())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("Lenght", "no part is called 'Lenght'; did you mean Length?"),
        ("Length: {min_char: 3}", "has no field 'min_char'; did you mean min_chars?"),
        ("my_parts:MostlyLeters", "'MostlyLeters' is not there in .*my_parts.py; did you mean MostlyLetters?"),
        ("my_part:MostlyLetters", "no module 'my_part' in "),
        ("my_parts:HEAD", "'HEAD' is str, not a class"),
        ("my_parts:Path", "is no Filter, Map or Signal"),
        ("my_parts:MostlyLetters: {min_share: much}", "field min_share = 'much': is no float"),
        ("my_parts:MostlyLetters: 3", "3 is not a set of fields"),
        ("my_parts:MostlyLetters {min_share: 0.5}", "not told apart; write my_parts:MostlyLetters: {field: value}"),
        ("{a: 1, b: 2}", "is not a part"),
    ],
)
def test_a_part_that_is_not_there_is_refused_with_the_nearest(user: Any, entry: str, said: str) -> None:
    user(LETTERS + "HEAD = 'text'\n")
    with pytest.raises(ConfigError, match=said):
        parts(entry)


def test_columns_that_collide_or_are_no_columns_of_documents_are_refused(
    user: Any, prepare: PrepareIt, corpus: Path
) -> None:
    signal = "@dataclass(frozen=True)\nclass S(Signal):\n    adds = (Column('{}', 'float32', per='{}'),)\n"
    taken = [
        ("text", "piece", "adds the column 'text', which is there already"),
        ("row", "document", "'row', which every documents file has"),
    ]
    for name, per, said in [
        *taken,
        ("shard", "piece", "'shard', which every"),
        ("source", "piece", "'source', which"),
        ("x", "token", "adds 'x' per token"),
    ]:
        user(signal.format(name, per))
        with pytest.raises(ConfigError, match=said):
            prepare(corpus, transforms=parts("my_parts:S"))


def test_columns_of_the_source_and_of_signals_travel_to_the_batch(user: Any, prepare: PrepareIt, corpus: Path) -> None:
    import datasets
    import torch

    user("""
@dataclass(frozen=True)
class Size(Signal):
    needs = ("text",)
    adds = (Column("size", "float32", per="piece"), Column("odd", "bool", per="document"))

    def measure(self, batch):
        sizes = [len(text) for text in batch["text"].to_pylist()]
        return {"size": sizes, "odd": [size % 2 == 1 for size in sizes]}
""")
    prepared = prepare(
        corpus, transforms=parts("my_parts:Size"), carry_columns=("id", "url"), packing="bfd_split", seq_len=8
    )
    kept = [number for number, text in enumerate(TEXTS) if text.strip()]
    pieces = [
        (number, url, size)
        for row in datasets.load_from_disk(str(prepared.path))
        for number, url, size in zip(row["id"], row["url"], row["size"], strict=True)
    ]
    assert {number for number, _, _ in pieces} == set(kept)
    assert all(url == f"u/{number}" and size == len(TEXTS[number]) for number, url, size in pieces)
    rows = PackedRows.of(prepared)
    batch = PackedCollator(pad_id=0, beside=prepared.beside)([rows[0], rows[1]])
    assert batch["url"] == [rows[0].beside["url"], rows[1].beside["url"]]
    assert batch["id"].dtype == torch.int64
    assert batch["size"].shape == (2, max(len(rows[0].seq_lengths), len(rows[1].seq_lengths)))
    assert all(check.ok for check in verify(prepared.path))
    table = documents(prepared)
    assert [row["odd"] for row in table] == [len(text) % 2 == 1 if text.strip() else None for text in TEXTS]
    assert sum(row["pieces"] for row in table) == len(pieces)
    assert sum(row["tokens"] for row in table) == prepared.content["tokens"]


def test_documents_say_where_they_came_from_and_where_they_went(prepare: PrepareIt, corpus: Path) -> None:
    prepared = prepare(corpus, packing="bfd_split", seq_len=8)
    rows = [list(row.input_ids) for row in map(PackedRows.of(prepared).__getitem__, range(prepared.content["rows"]))]
    raw, alone = corpus.read_bytes(), prepare(corpus)  # without packing, a row is a document
    whole = [list(row.input_ids) for row in map(PackedRows.of(alone).__getitem__, range(alone.content["rows"]))]
    table = documents(prepared)
    for number, row in enumerate(table):
        assert json.loads(raw[row["offset"] :].split(b"\n")[0])["id"] == number
        if row["reason"] is None:
            ids = whole.pop(0)
            assert len(ids) == row["tokens"]
            found = rows[row["first_row"]][row["position"] :]
            assert found[: min(len(ids), len(found), 8)] == ids[: min(len(ids), len(found), 8)][: len(found)]
    assert not whole


def test_a_map_changes_texts_and_adds_what_later_parts_need(
    user: Any, prepare: PrepareIt, texts: Any, corpus: Path
) -> None:
    user("""
@dataclass(frozen=True)
class Upper(Map):
    needs = ("text",)
    adds = (Column("was", "int64", per="document"),)

    def apply(self, batch):
        texts = batch["text"].to_pylist()
        upper = pa.array([text.upper() for text in texts], pa.large_string())
        return pa.record_batch({"text": upper, "was": [len(text) for text in texts]})


@dataclass(frozen=True)
class Longer(Filter):
    needs = ("was",)

    def keep(self, batch):
        return [was > 4 for was in batch["was"].to_pylist()]
""")
    prepared = prepare(corpus, transforms=parts("my_parts:Longer", "my_parts:Upper"))
    assert texts(prepared) == [text.upper() for text in TEXTS if len(text) > 4 and text.strip()]


def test_a_value_of_another_type_than_its_column_is_a_bad_record(tmp_path: Path, prepare: PrepareIt) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c"}]
        + [{"text": "x", "n": 3}] * 100
        + [{"text": "d", "n": "four"}],
    )
    prepared = prepare(path, carry_columns=("n",))
    assert prepared.content["quarantined"] == {"column type": 1}
    with pytest.raises(ConfigError, match=r"carry_columns: 'm' is a column of no source \(found: text, n\)"):
        prepare(path, carry_columns=("m",))


def test_sources_of_three_kinds_with_settings_of_their_own(
    user: Any, prepare: PrepareIt, texts: Any, tmp_path: Path, start_moai: Any, tokenizer_dir: Path
) -> None:
    """In YAML, by flags and from Python: the same content."""
    folder = user(LETTERS)
    write_lines(tmp_path / "web.jsonl", [{"body": text, "url": "u"} for text in TEXTS])
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(["one\nfile", "a", "!!!"]):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    write_lines(
        tmp_path / "other.jsonl", [{"post": f"{text} {number}", "title": "t"} for number in range(20) for text in TEXTS]
    )
    (folder / "data.yaml").write_text(
        f"""
dataset:
  - {{path: {tmp_path}/web.jsonl, text_column: body, transforms: [{{"my_parts:MostlyLetters": {{min_share: 0.5}}}}]}}
  - {{path: {tmp_path}/notes, name: files, txt_document: file, min_chars: 2}}
  - {{path: {tmp_path}/other.jsonl, name: posts, text_template: "{{title}}: {{post}}", sample: 0.5}}
tokenizer_path: {tokenizer_dir}
seq_len: 4096
num_proc: 0
cache_dir: {tmp_path}/yaml
"""
    )
    done = start_moai(
        "prepare", "--config", folder / "data.yaml", env={"PYTHONPATH": str(Path(__file__).parent.parent)}
    )
    assert done.returncode == 0, done.stderr
    assert "other.jsonl" not in done.stdout + done.stderr.replace(str(tmp_path), "") or "posts: 1 files" in done.stderr
    assert "posts: 1 files, text from template" in done.stderr
    from_yaml = Prepared.open(Path(done.stdout.splitlines()[-1]))
    part = parts("my_parts:MostlyLetters: {min_share: 0.5}")
    prepared = prepare(
        {"path": str(tmp_path / "web.jsonl"), "text_column": "body", "transforms": part},
        {"path": tmp_path / "notes", "name": "files", "txt_document": "file", "min_chars": 2},
        f"posts={tmp_path}/other.jsonl,text_template={{title}}: {{post}},sample=0.5",
    )
    assert prepared.content_digest == from_yaml.content_digest
    found = texts(prepared)
    web = [text for text in TEXTS if text.strip() and mostly(text)]
    assert found[: len(web)] == web
    assert found[len(web) : len(web) + 2] == ["one\nfile", "!!!"]
    posts = found[len(web) + 2 :]
    every = [f"t: {text} {number}" for number in range(20) for text in TEXTS]
    assert posts == [text for text in every if xxhash.xxh3_64_intdigest(text.encode(), seed=1) < 2**63], (
        "another half than the one of Split"
    )
    assert 40 < len(posts) < 130
    assert [source["name"] for source in prepared.content["sources"]] == ["web.jsonl", "files", "posts"]
    assert [source["not_read"] for source in prepared.content["sources"]] == [["url"], [], []]
    assert all(check.ok for check in verify(prepared.path))
    listing = json.loads((prepared.path / "sources.json").read_text())
    assert listing[1]["files"] == ["0.txt", "1.txt", "2.txt"]
    assert listing[1]["settings"] == {"min_chars": 2, "txt_document": "file"}


def test_a_renamed_source_makes_no_shard_again_and_goes_by_its_new_name(
    prepare: PrepareIt, corpus: Path, tmp_path: Path, caplog: Any
) -> None:
    first = prepare(corpus)
    corpus.rename(tmp_path / "b.jsonl")
    caplog.set_level("INFO", "moai")
    second = prepare(tmp_path / "b.jsonl")
    assert "1 shards, 1 reused" in caplog.text
    assert second.content["sources"][0]["name"] == "b.jsonl"
    assert second.path != first.path
    assert [shard["xxh3_128"] for shard in second.content["shards"]] == [
        shard["xxh3_128"] for shard in first.content["shards"]
    ]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "x", "text_colum": "a"}, "no setting 'text_colum'; did you mean text_column?"),
        ({"name": "x"}, "neither a path nor a source"),
        ({"path": "x", "sample": 2.0}, r"x: sample = 2.0: must lie above 0"),
        ({"path": "x", "min_chars": "many"}, "field min_chars = 'many': is no int"),
        ("n=x,wieght=3", "no setting 'wieght'; did you mean weight?"),
        ({"path": "x", "transforms": ["Lenght"]}, "x: transforms: no part is called 'Lenght'"),
        ({"source": "my_parts:MostlyLetters"}, "is no source: it has no shards"),
        (7, "is no path, no entry and no source"),
    ],
)
def test_an_entry_that_says_something_odd_is_refused(user: Any, entry: Any, said: str) -> None:
    from moai.pretraining.dataset import parse_dataset

    user(LETTERS)
    with pytest.raises(ConfigError, match=said):
        parse_dataset([entry], place="--dataset")


def test_settings_json_says_entries_and_parts_as_a_file_would(user: Any) -> None:
    from moai.core.config import resolve
    from moai.pretraining.options import DataConfig

    user(LETTERS)
    words = ["--dataset", "data/a", "b=data/b,weight=0.5", "--transforms", "my_parts:MostlyLetters: {min_share: 0.6}"]
    written = json.loads(json.dumps(resolve([DataConfig], words, {}, prog="moai").table()))
    assert written["dataset"]["value"] == ["data/a", {"name": "b", "path": "data/b", "weight": 0.5}]
    assert written["transforms"]["value"] == [{"my_parts:MostlyLetters": {"min_share": 0.6}}]


def test_weights_of_entries_are_the_mixture(tmp_path: Path) -> None:
    from moai.pretraining.dataset import own_mixture, parse_dataset

    entries = parse_dataset(
        [f"a={tmp_path}/x,weight=0.3,max_epochs=2", {"path": "data/b.jsonl", "weight": 1}], place="--dataset"
    )
    assert own_mixture(entries) == (("a=0.3", "b.jsonl=1"), ("a=2",))
    with pytest.raises(ConfigError, match="c has no weight and others have one"):
        own_mixture([*entries, "data/c"])


def test_a_source_that_is_not_files(user: Any, prepare: PrepareIt, texts: Any) -> None:
    user("""
from moai.engine.pipeline import Meter, Raw, Shard

@dataclass(frozen=True)
class Numbers:
    upto: int
    name: str = "numbers"

    def shards(self):
        for first in range(0, self.upto, 10):
            yield Shard(f"numbers:{first:05d}", (first,), "", 100)

    def digest(self, shard):
        meter = Meter()
        meter.begin_segment()
        meter.update(str(shard.segments).encode(), lines=10)
        return meter.raw()

    def read(self, shard, meter):
        meter.begin_segment()
        meter.update(str(shard.segments).encode(), lines=10)
        (first,) = shard.segments
        numbers = range(first, first + 10)
        yield pa.record_batch({"text": [f"number {n}" for n in numbers], "n": list(numbers)})

    def remember(self, shard, raw):
        pass
""")
    for num_proc in (0, 2):
        prepared = prepare({"source": "my_parts:Numbers: {upto: 30}"}, carry_columns=("n",), num_proc=num_proc)
        assert texts(prepared) == [f"number {n}" for n in range(30)]
        assert prepared.content["sources"][0]["name"] == "numbers"
        assert all(check.ok for check in verify(prepared.path))


def test_an_executor_of_ones_own_gives_the_same_content(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, prepare: PrepareIt
) -> None:
    """Threads, in a few lines."""
    import moai
    from moai.engine.pipeline import run_shard

    ran: list[str] = []

    class Threads:
        def start(self) -> None:
            pass

        def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

        def map(self, pipelines: Any, orders: Any, on_documents: Any) -> Iterator[Any]:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(2) as pool:
                made = [
                    (order, pool.submit(run_shard, pipelines[order[0]], order[1], on_documents)) for order in orders
                ]
                for order, future in made:
                    ran.append(order[1].id)
                    yield (order, *future.result())

    options = {"tokenizer_path": str(tokenizer_dir), "seq_len": 64, "packing": "bfd_split", "shard_bytes": 1000}
    big = write_lines(tmp_path / "big.jsonl", [{"text": f"document {number} " * 5} for number in range(200)])
    made = moai.prepare(dataset=str(big), cache_dir=str(tmp_path / "threads"), executor=Threads(), **options)
    assert len(ran) == len(made.manifest["content"]["shards"]) > 3
    assert (
        made.content_digest
        == prepare(big, **{name: value for name, value in options.items() if name != "tokenizer_path"}).content_digest
    )
