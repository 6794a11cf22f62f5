"""`python -m moai bench`: what it prints agrees with a real preparation of the same slice and with itself, and it
leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moai.bench import BenchConfig, measure
from moai.bench.limit import Bare
from moai.bench.report import Report, Stretch, bytes_per_second
from moai.core.errors import ConfigError
from moai.prepared.manifest import Prepared
from moai.pretraining.options import DataConfig
from moai.sources.streams import open_blocks
from moai.tokenizers.backends import Fastokens
from moai.transforms.tokenize import WINDOW_CHARS

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tokenizers" / "demo"
SHARD_BYTES = 200_000
Moai = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped corpus as one file of plain lines, 4.7 MB."""
    path = tmp_path_factory.mktemp("corpus") / "all.jsonl"
    path.write_bytes(
        b"".join(
            block
            for packed in sorted((ROOT / "data" / "demo").glob("*.jsonl.zst"))
            for block in open_blocks(str(packed), "zst", 1 << 20)
        )
    )
    return path


def flags(dataset: Path, folder: Path) -> list[object]:
    own = ["--dataset", dataset, "--tokenizer_path", TOKENIZER, "--shard_bytes", SHARD_BYTES]
    return [*own, "--packing", "bfd_split", "--seq_len", 256, "--num_proc", 2, "--cache_dir", folder / "cache"]


def report(dataset: Path, folder: Path, *, seconds: float = 60.0, **changes: Any) -> Report:
    """In this process."""
    given = {
        "tokenizer_path": str(TOKENIZER),
        "packing": "bfd_split",
        "seq_len": 256,
        "shard_bytes": SHARD_BYTES,
        "num_proc": 0,
        **changes,
    }
    config = DataConfig(dataset=(str(dataset),), cache_dir=str(folder / "cache"), **given)
    return measure(config, BenchConfig(seconds=seconds), {"num_proc": "flag"})


def numbers(line: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def sections(printed: str) -> dict[str, list[str]]:
    """Lines by the word at their beginning."""
    found: dict[str, list[str]] = {}
    for line in printed.splitlines():
        word = line[:13].strip() or list(found)[-1]
        found.setdefault(word, []).append(line[13:])
    return found


def everything_in(folder: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_all_of_the_data_gives_the_numbers_of_a_preparation_and_they_agree_with_one_another(
    corpus: Path, tmp_path: Path, run_moai: Moai, start_moai: Moai
) -> None:
    ran = start_moai("bench", *flags(corpus, tmp_path), "--seconds", 60, "--gigabytes", 250)
    assert ran.returncode == 0, ran.stderr
    said = sections(ran.stdout)
    prepared = run_moai("prepare", *flags(corpus, tmp_path))
    assert [f"{word:13}{said[word][0]}" for word in ("documents", "tokens")] == prepared.stdout.splitlines()[:2]
    content = Prepared.open(Path(prepared.stdout.splitlines()[-1])).content
    size, shards, *_ = numbers(said["slice"][0])
    assert "(all of it)" in said["slice"][0]
    assert (size, shards) == (corpus.stat().st_size, len(content["shards"]))
    assert numbers(said["disk"][0])[0] == pytest.approx(
        sum(shard["bytes"] for shard in content["shards"]) / content["tokens"], abs=0.001
    )
    assert said["backend"][0].startswith("fastokens")
    speed, tokens = numbers(said["speed"][0])
    assert tokens * 1e6 / speed / 1e6 == pytest.approx(content["tokens"] / size, rel=0.1)
    a_worker, at_work, _ = numbers(said["speed"][1])
    assert at_work == 2
    assert a_worker * at_work == pytest.approx(speed, rel=0.1)  # all are rounded, which is much of a small number
    shares = numbers(said["worker"][0])
    assert len(shares) == 3
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(100, abs=0.2)
    limit, processes = numbers(said["limit"][0])[:2]
    assert processes == 2
    assert numbers(said["limit"][1])[0] == pytest.approx(100 * speed / limit, rel=0.1)
    startup = numbers(said["start-up"][0])[0]
    assert 0.05 < startup < 60
    assert "seconds for this data" in said["time"][0]
    assert numbers(said["time"][0])[0] == pytest.approx(startup + size / speed / 1e6, rel=0.1)
    assert numbers(said["time"][1]) == [pytest.approx(250e3 / speed / 3600, rel=0.1), 250]


def test_a_slice_is_what_a_preparation_of_its_first_shards_holds(
    corpus: Path, tmp_path: Path, prepare: Callable[..., Prepared]
) -> None:
    found = report(corpus, tmp_path, seconds=1e-6, num_proc=3)
    assert not found.whole
    assert found.total_bytes == corpus.stat().st_size
    assert 3 <= len(found.laps) < corpus.stat().st_size // SHARD_BYTES
    first = tmp_path / "first.jsonl"
    first.write_bytes(corpus.read_bytes()[: found.bytes])
    content = prepare(first, packing="bfd_split", seq_len=256, shard_bytes=SHARD_BYTES).content
    counts = content["token_counts"]
    assert {name: found.counts[f"tokens.{name}"] for name in counts} == counts
    assert (found.tokens, found.counts["kept"]) == (counts["text"] + counts["eos"], content["documents"])


def test_the_limit_tokenizes_what_moai_tokenizes(corpus: Path, tmp_path: Path) -> None:
    found = report(corpus, tmp_path, num_proc=2)
    assert found.bare
    assert sum(stretch.bytes for stretch in found.limit) == found.bytes == corpus.stat().st_size
    assert sum(stretch.tokens for stretch in found.limit) == found.counts["tokens.text"]
    assert len({stretch.worker for stretch in found.limit}) == 2


@pytest.mark.parametrize("kind", ["compressed", "parquet"])
def test_other_kinds_of_files_are_measured_too(kind: str, corpus: Path, tmp_path: Path) -> None:
    data = ROOT / "data" / "demo"
    if kind == "parquet":
        data = tmp_path / "all.parquet"
        pq.write_table(
            pa.table({"text": [f"문서 {number} of the table. " * 20 for number in range(2000)]}),
            data,
            row_group_size=200,
        )
    found = report(data, tmp_path, shard_bytes=16_000_000)
    assert not found.bare
    assert "(with moai's reader: not plain JSON lines)" in "\n".join(found.lines())
    assert sum(stretch.tokens for stretch in found.limit) == found.counts["tokens.text"] > 10_000
    if kind == "compressed":
        assert found.bytes == corpus.stat().st_size


def test_large_compressed_files_are_cut_by_the_driver_and_read_as_lines(corpus: Path, tmp_path: Path) -> None:
    found = report(ROOT / "data" / "demo" / "ko.jsonl.zst", tmp_path, num_proc=1, shard_bytes=100_000)
    assert found.bare
    assert found.whole
    assert len(found.laps) > 5
    assert sum(stretch.tokens for stretch in found.limit) == found.counts["tokens.text"]


def test_each_kind_of_file_has_its_part_in_a_slice(corpus: Path, tmp_path: Path) -> None:
    """Else the first files alone would stand for all."""
    folder = tmp_path / "data"
    folder.mkdir()
    size = 4 * SHARD_BYTES
    for name in ("a", "b", "c"):
        shutil.copy(corpus, folder / f"{name}.jsonl")
        os.truncate(folder / f"{name}.jsonl", size)
    found = report(folder, tmp_path, seconds=1e-6, num_proc=3)
    alone = report(folder / "a.jsonl", tmp_path)
    first, *others = (lap.stretch.bytes for lap in alone.laps)
    assert first not in others, "the shards must differ in size for this to prove anything"
    assert [lap.stretch.bytes for lap in found.laps].count(first) == 3


def test_a_backend_that_gives_other_ids_is_measured_no_further(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fastokens.encode_batch

    def lie(self: Fastokens, texts: Any) -> Any:
        ids, offsets = real(self, texts)
        proving = (
            len(texts) == 1 and len(texts[0]) != WINDOW_CHARS
        )  # proves itself text by text, then lies in batches and in their windows
        return (ids if proving else ids[::-1].copy()), offsets

    monkeypatch.setattr(Fastokens, "encode_batch", lie)
    found = report(corpus, tmp_path, seconds=1e-6)
    assert found.backend.backend.made_by()["tokenizer"] == "tokenizers"
    assert "gave other ids" in next(found.lines())


def test_rates_add_up_over_workers_and_leave_out_when_they_began() -> None:
    stretches = [
        Stretch(1, 0.0, 1.0, 100, 1),
        Stretch(1, 1.5, 2.0, 100, 1),
        Stretch(2, 1.0, 2.0, 300, 1),
        Stretch(3, 2.0, 2.0, 0, 0),
    ]
    assert bytes_per_second(stretches) == 200 / 2 + 300


@pytest.mark.parametrize("has_cache", [False, True], ids=["new", "used"])
def test_nothing_is_left_and_the_cache_is_as_it_was(
    has_cache: bool, corpus: Path, tmp_path: Path, run_moai: Moai
) -> None:
    if has_cache:
        assert run_moai("prepare", *flags(corpus, tmp_path)).returncode == 0
    before = everything_in(tmp_path)
    ran = run_moai("bench", *flags(corpus, tmp_path), "--seconds", 0.2)
    assert ran.returncode == 0, ran.stderr
    assert everything_in(tmp_path) == before


def test_stopped_in_the_middle_it_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moai", "bench", *map(str, flags(corpus, tmp_path))]
    words += ["--tokenizer_backend", "tokenizers", "--seconds", "600"]
    running = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stderr
    while not list(tmp_path.glob(".moai-bench-*/shards/*.json")):  # the first shard is done: its receipt is there
        assert running.poll() is None, running.stderr.read()
    os.killpg(running.pid, signal.SIGINT)
    printed, said = running.communicate(timeout=600)
    assert (running.returncode, printed) == (130, "")
    assert (
        said.splitlines()[-1] == "python -m moai bench: error: stopped by SIGINT; a measurement leaves nothing behind"
    )
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(tmp_path: Path, run_moai: Moai) -> None:
    data = f"--dataset data/demo --tokenizer_path {TOKENIZER}"
    for words, code, message in (
        ("", 2, "no data: name files"),
        ("--dataset data/demo", 2, "no tokenizer: set --tokenizer_path"),
        (f"--dataset data/none --tokenizer_path {TOKENIZER}", 66, "data/none"),
        (f"{data} --seconds 0", 2, "seconds = 0.0: must be above 0"),
        (f"{data} --gigabytes many", 2, "--gigabytes: 'many' is not of type float"),
        (f"{data} --gigabyte 1", 2, "did you mean --gigabytes?"),
        (f"{data} --min_chars 99999999", 66, "no document is left of what was read; nothing to measure"),
    ):
        ran = run_moai("bench", *words.split(), "--cache_dir", tmp_path / "cache", env={"HF_HUB_OFFLINE": "1"})
        assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
        last = ran.stderr.splitlines()[-1]
        assert last.startswith("python -m moai bench: error: ")
        assert message in last
        assert list(tmp_path.iterdir()) == []


def test_nonsense_is_refused_where_it_is_said() -> None:
    for nonsense in ({"seconds": -1.0}, {"seconds": float("inf")}, {"gigabytes": float("nan")}):
        with pytest.raises(ConfigError, match="must be above 0"):
            BenchConfig(**nonsense)


def test_the_limit_passes_over_what_is_no_record_or_is_refused(tmp_path: Path) -> None:
    class OnlyShort:
        def encode_batch(self, texts: list[str]) -> tuple[list[int], list[int]]:
            if any(len(text) > 3 for text in texts):
                raise ValueError("too long")
            return [0] * sum(map(len, texts)), []

    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "ab"}\nno json {"text": "d"}\n{"other": 1}\n[1]\n\n{"text": "abcd"}\n{"text": "c"}\n')
    middle, end = (
        path.read_bytes().index(b'{"text": "d"}'),
        path.stat().st_size + 100,
    )  # as if the file had become shorter since
    whole = Bare(OnlyShort(), "text", ((str(path), 0, end),))  # type: ignore[arg-type]
    halves = [Bare(whole.backend, "text", ((str(path), *bounds),)) for bounds in ((0, middle), (middle, end))]
    assert whole() == sum(half() for half in halves) == 3
