"""Preparation as a whole, on the shipped corpus: same bytes however it is run, everything reused that can be, nothing
lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from stamps import wait_until_stamps_prove
from tokenizers import Tokenizer

from moai.cache.ledger import Ledger
from moai.core.errors import DamagedError, SourceError, StorageError
from moai.core.files import read_range
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import prepare
from moai.sources.streams import open_blocks

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tokenizers" / "demo"
SEQ_LEN = 256
SHARD_BYTES = 100_000


def config(dataset: Path, cache: Path, **changes: Any) -> DataConfig:
    given = {
        "tokenizer_path": str(TOKENIZER),
        "seq_len": SEQ_LEN,
        "packing": "bfd_split",
        "shard_bytes": SHARD_BYTES,
        "num_proc": 0,
        **changes,
    }
    return DataConfig(dataset=(str(dataset),), cache_dir=str(cache), **given)


def make(dataset: Path, cache: Path, **changes: Any) -> Prepared:
    return prepare(config(dataset, cache, **changes), origins={"num_proc": "flag"})


def made_and_reused(prepared: Prepared) -> tuple[int, int]:
    return prepared.manifest["run"]["shards_made"], prepared.manifest["run"]["shards_reused"]


def fingerprint(prepared: Prepared) -> str:
    """sha256 over every shard's bytes and the manifest's content part."""
    digest = hashlib.sha256()
    for path in sorted(prepared.path.glob("data-*.arrow")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps(prepared.content, sort_keys=True).encode())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the shipped corpus, unpacked; files older than the two seconds in which a stamp proves nothing."""
    folder = tmp_path_factory.mktemp("corpus")
    for packed in sorted((ROOT / "data" / "demo").glob("*.jsonl.zst")):
        lines = b"".join(open_blocks(str(packed), "zst", 1 << 20)).splitlines(keepends=True)
        (folder / packed.stem).write_bytes(b"".join(lines[::4]))
    wait_until_stamps_prove(folder)
    return folder


@pytest.fixture
def own_corpus(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "data"))


def texts(folder: Path) -> list[str]:
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines())
    return [json.loads(line)["text"] for line in lines]


def rows_of(prepared: Prepared) -> Iterator[list[list[int]]]:
    """Each row as its pieces, as `datasets` gives them."""
    data = datasets.load_from_disk(str(prepared.path))
    for row in data.with_format("numpy"):
        yield [piece.tolist() for piece in np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])]


@cache
def expected_ids(folder: Path) -> list[list[int]]:
    """Independently of moai: encode, append EOS."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    return [[*encoding.ids, eos] for encoding in tokenizer.encode_batch_fast(texts(folder), add_special_tokens=False)]


def expected_pieces(folder: Path, *, split: bool) -> list[tuple[int, ...]]:
    """Those cut every seq_len."""
    return [
        tuple(ids[at : at + SEQ_LEN])
        for ids in expected_ids(folder)
        for at in range(0, len(ids) if split else 1, SEQ_LEN)
    ]


VARIANTS = [
    {"num_proc": 0, "dataset_batch_size": 64, "writer_batch_size": 1000},
    {"num_proc": 1, "dataset_batch_size": 4096, "writer_batch_size": 100_000},
    {"num_proc": 2, "dataset_batch_size": 64, "writer_batch_size": 100_000, "memory_mode": "disk"},
    {"num_proc": 5, "dataset_batch_size": 4096, "writer_batch_size": 1000, "memory_mode": "memory"},
]


@pytest.mark.parametrize(
    ("packing", "packed"),
    [
        ("wrapped", False),
        ("bfd", False),
        ("bfd_split", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("none", False), ("wrapped", True), ("bfd", True))),
    ],
)
def test_same_input_same_bytes_for_any_workers_and_batches(
    corpus: Path, tmp_path: Path, packing: str, packed: bool
) -> None:
    dataset = ROOT / "data" / "demo" if packed else corpus
    results = [
        make(dataset, tmp_path / str(number), packing=packing, shard_bytes=300_000 if packed else 75_000, **variant)
        for number, variant in enumerate(VARIANTS)
    ]
    assert len(results[0].content["shards"]) >= 8
    assert len({fingerprint(prepared) for prepared in results}) == 1
    assert len({prepared.path.name for prepared in results}) == 1


@pytest.mark.parametrize("packing", ["wrapped", "bfd_split"])
def test_rows_that_waited_for_the_writer_leave_no_trace(corpus: Path, tmp_path: Path, packing: str) -> None:
    """Shards of several record batches, whose last rows are of odd lengths: what a slice has behind it must not get
    into the file.
    """
    sizes = (1, 1500, 100_000)
    results = [
        make(corpus, tmp_path / str(rows), packing=packing, seq_len=33, shard_bytes=1_000_000, writer_batch_size=rows)
        for rows in sizes
    ]
    assert max(shard["rows"] for shard in results[0].content["shards"]) > 2500
    assert len({fingerprint(prepared) for prepared in results}) == 1


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "bfd_split", "none"])
def test_rows_hold_exactly_the_documents(corpus: Path, tmp_path: Path, packing: str) -> None:
    prepared = make(corpus, tmp_path, packing=packing)
    rows = list(rows_of(prepared))
    assert all(0 < sum(map(len, row)) <= SEQ_LEN for row in rows)
    pieces = [tuple(piece) for row in rows for piece in row]
    if packing == "wrapped":
        tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        stream = [token for piece in pieces for token in piece]
        assert tokenizer.decode(stream, skip_special_tokens=False) == "".join(
            text + "<|endoftext|>" for text in texts(corpus)
        )
        short = [len(row) for row in rows if sum(map(len, row)) < SEQ_LEN]
        assert len(short) <= len(prepared.content["shards"])  # only a shard's last row
    else:
        assert Counter(pieces) == Counter(expected_pieces(corpus, split=packing == "bfd_split"))
    dropped = prepared.content["token_counts"].get("dropped", 0)
    assert (dropped > 0) == (packing in ("bfd", "none"))
    assert [check for check in verify(prepared.path) if not check.ok] == []


def test_a_document_a_row_can_be_split_instead(corpus: Path, tmp_path: Path) -> None:
    prepared = make(corpus, tmp_path, packing="none", long_documents="split")
    assert [tuple(row[0]) for row in rows_of(prepared)] == expected_pieces(corpus, split=True)
    assert "dropped" not in prepared.content["token_counts"]


def test_a_second_run_reads_and_prepares_nothing(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(corpus, tmp_path)
    monkeypatch.setattr("moai.sources.kinds.stream.read_range", _must_not_read)
    monkeypatch.setattr("moai.sources.kinds.stream.read_lines_in", _must_not_read)
    with caplog.at_level(logging.INFO):
        second = make(corpus, tmp_path)
    assert second.path == first.path
    assert "Found prepared" in caplog.text
    assert "shards reused: all" in caplog.text


def _must_not_read(*_: Any) -> Any:
    raise AssertionError("data was read")


def test_unchanged_content_under_a_new_stamp_is_a_hit(own_corpus: Path, tmp_path: Path) -> None:
    first = make(own_corpus, tmp_path / "cache")
    shards = len(first.content["shards"])
    for path in own_corpus.iterdir():
        os.utime(path, ns=(1, 1))
    second = make(own_corpus, tmp_path / "cache")
    assert second.path == first.path
    assert made_and_reused(first) == (shards, 0)
    assert len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) == shards  # nothing new was made


def test_a_file_rewritten_within_the_racy_seconds_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "first words"}\n')
    first = make(data, tmp_path / "cache")
    stamp = (data / "a.jsonl").stat()
    (data / "a.jsonl").write_text('{"text": "other words"}\n')  # same size, same inode
    os.utime(data / "a.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert make(data, tmp_path / "cache").path != first.path


def test_one_file_added_prepares_only_that_file(
    own_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = make(own_corpus, tmp_path / "cache")
    korean = (own_corpus / "ko.jsonl").read_bytes()
    changed = [korean.replace(b'"text": "', b'"text": "' + letter) for letter in (b"x", b"y")]
    (own_corpus / "extra.jsonl").write_bytes(b"".join(changed))
    with caplog.at_level(logging.INFO):
        after = make(own_corpus, tmp_path / "cache")
    made, reused = made_and_reused(after)
    assert reused >= len(before.content["shards"])  # one in which no line begins is like any other
    assert made == len(after.content["shards"]) - reused > 1
    assert "file extra.jsonl added" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_len": 128}, "seq_len 256 -> 128"),
        ({"packing": "wrapped"}, "packing bfd_split -> wrapped"),
        ({"min_chars": 50}, "min_chars 1 -> 50"),
        ({"text_template": "{source} {text}"}, "text_template None -> {source} {text}"),
        ({"add_bos": True}, "add_bos False -> True"),
        ({"eos_token": "</s>"}, "eos_id"),
    ],
)
def test_a_changed_setting_is_another_key_and_the_log_says_which(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], said: str
) -> None:
    first = make(corpus, tmp_path)
    with caplog.at_level(logging.INFO):
        second = make(corpus, tmp_path, **change)
    assert second.path != first.path
    assert made_and_reused(second)[1] == 0
    assert said in next(line for line in caplog.messages if "Cache miss" in line and "nothing was prepared" not in line)


def test_a_changed_tokenizer_byte_is_another_key(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(corpus, tmp_path / "cache")
    other = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, other)
    value = json.loads((other / "tokenizer.json").read_text())
    value["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(value, ensure_ascii=False))
    with caplog.at_level(logging.INFO):
        second = make(corpus, tmp_path / "cache", tokenizer_path=str(other))
    assert second.path != first.path
    assert made_and_reused(second)[1] == 0
    assert "tokenizer_sha256" in caplog.text


def test_a_changed_input_byte_remakes_only_its_shard(
    own_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(own_corpus, tmp_path / "cache")
    path = own_corpus / "en.jsonl"
    data = bytearray(path.read_bytes())
    at = data.index(b"the", len(data) // 2)
    data[at : at + 3] = b"THE"
    path.write_bytes(data)
    with caplog.at_level(logging.INFO):
        second = make(own_corpus, tmp_path / "cache")
    assert made_and_reused(second) == (1, len(first.content["shards"]) - 1)
    assert "file en.jsonl changed" in caplog.text


def test_every_field_of_the_configuration_says_whether_it_affects_the_output(corpus: Path, tmp_path: Path) -> None:
    """What is declared to have no effect gives the same directory."""
    first = make(corpus, tmp_path)
    for name, value in {
        "max_bad_ratio": 0.5,
        "num_proc": 1,
        "dataset_batch_size": 7,
        "writer_batch_size": 3,
        "memory_mode": "disk",
        "stall_timeout": 99.0,
        "rehash": True,
    }.items():
        assert make(corpus, tmp_path, **{name: value}).path == first.path, name


def prepare_command(dataset: Path, cache: Path, *flags: str) -> list[str]:
    given = {"dataset": dataset, "tokenizer_path": TOKENIZER, "cache_dir": cache, "shard_bytes": SHARD_BYTES}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    own = ["--seq_len", str(SEQ_LEN), "--packing", "bfd_split"]
    return [sys.executable, "-m", "moai", "prepare", *words, *own, *flags]


def run_prepare(dataset: Path, cache: Path, *flags: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        prepare_command(dataset, cache, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600, **more
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_goes_on_from_its_finished_shards(corpus: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """Stopped while its worker stands before the receipt of the third shard."""
    reference = make(corpus, tmp_path / "reference")
    cache, points = tmp_path / "cache", tmp_path / "points"
    points.mkdir()
    armed = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": "receipt.commit:3=pause"}
    command = prepare_command(corpus, cache, "--num_proc", "1")
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | armed, stderr=subprocess.PIPE, text=True)
    while not (points / "receipt.commit.3").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(stop)
    _, said = running.communicate(timeout=600)
    assert running.returncode == 128 + stop, said
    assert "Traceback" not in said
    finished = len([p for p in (cache / "shards").glob("*.json") if not p.name.startswith(".")])
    assert 2 <= finished < len(reference.content["shards"])
    assert not list((cache / "datasets").iterdir())
    prepared = make(corpus, cache)
    assert made_and_reused(prepared)[1] == finished
    assert fingerprint(prepared) == fingerprint(reference)
    assert not list((cache / "attempts").iterdir())


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the same kind of error, from the same calls, without a mount."""
    cache = tmp_path / "cache"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    full = run_prepare(corpus, cache, "--num_proc", "0", preexec_fn=limit)
    assert full.returncode == 74
    errors = [line for line in full.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "finished shards are kept" in errors[0]
    assert "Traceback" not in full.stderr
    assert not list((cache / "datasets").iterdir())
    assert not list((cache / "attempts").iterdir())
    assert made_and_reused(make(corpus, cache))[0] > 0


def test_too_little_space_is_said_before_the_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moai.pretraining.recipe.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"GiB are needed, 0.0 GiB are free"):
        make(corpus, tmp_path)
    assert not list((tmp_path / "shards").iterdir())


def read_only(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command while `folder` is mounted read-only, for it alone."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(folder), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_read_only_cache_is_one_line_on_a_miss_and_works_on_a_hit(corpus: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or read_only(["true"], tmp_path).returncode != 0:
        pytest.skip("needs the right to mount")
    cache = tmp_path / "cache"
    make(corpus, cache)
    command = prepare_command(corpus, cache)
    miss = read_only([*command, "--seq_len", "128"], cache)
    assert miss.returncode == 74, miss.stderr
    assert "it is read-only: name a writable --cache_dir" in miss.stderr.splitlines()[-1]
    assert "Traceback" not in miss.stderr
    hit = read_only(command, cache)
    assert hit.returncode == 0, hit.stderr
    assert "Found prepared" in hit.stderr


def test_a_file_where_the_cache_should_be_is_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    failed = run_prepare(corpus, tmp_path / "cache")
    assert failed.returncode == 74
    assert "a file stands where a directory is needed" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_damage_is_refused_with_file_and_difference(corpus: Path, tmp_path: Path) -> None:
    prepared = make(corpus, tmp_path)
    victim = sorted(prepared.path.glob("data-*.arrow"))[1]
    whole = victim.read_bytes()
    victim.unlink()
    with pytest.raises(DamagedError, match=f"{victim.name}.*though the manifest lists it"):
        Prepared.open(prepared.path)
    victim.write_bytes(whole[:-8])
    with pytest.raises(DamagedError, match=f"{victim.name}: {len(whole) - 8} bytes, the manifest says {len(whole)}"):
        Prepared.open(prepared.path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    victim.write_bytes(flipped)
    Prepared.open(prepared.path)  # the size is right: only hashing finds a flipped bit
    assert [check.name for check in verify(prepared.path) if not check.ok] == ["hashes"]


def test_a_damaged_shard_is_not_reused_but_made_again(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(corpus, tmp_path)
    before = fingerprint(first)
    victim = tmp_path / "shards" / f"{first.content['shards'][1]['shard_key']}.arrow"
    with open(victim, "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xfe")
    shutil.rmtree(first.path)
    with caplog.at_level(logging.WARNING):
        again = make(corpus, tmp_path)
    assert made_and_reused(again) == (1, len(first.content["shards"]) - 1)
    assert fingerprint(again) == before
    assert "set aside as" in caplog.text


def test_two_inputs_of_one_name_keep_their_shards_apart(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": f"only in {name}"}) + "\n")
    both = DataConfig(
        dataset=(str(tmp_path / "a/train.jsonl"), str(tmp_path / "b/train.jsonl")),
        tokenizer_path=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
        num_proc=0,
    )
    prepared = prepare(both, origins={})
    assert [source["name"] for source in prepared.content["sources"]] == ["train.jsonl", "train.jsonl-2"]
    assert prepared.content["documents"] == 2


def test_nothing_left_is_an_error_not_an_empty_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "  "}\n{"text": ""}\n')
    with pytest.raises(SourceError, match=r"no document is left \(2 read, 2 filtered, 0 quarantined\): 2 length.empty"):
        make(tmp_path / "a.jsonl", tmp_path / "cache")


def test_receipts_of_a_finished_cache_name_real_files(corpus: Path, tmp_path: Path) -> None:
    prepared = make(corpus, tmp_path)
    ledger = Ledger(tmp_path)
    for shard in filter(lambda shard: shard["file"], prepared.content["shards"]):
        receipt = ledger.receipt(shard["shard_key"])
        assert receipt is not None
        assert os.path.samefile(ledger.shard(shard["shard_key"]), prepared.path / shard["file"])
        assert receipt.made_by == {
            "tokenizer": "fastokens",
            "version": version("fastokens"),
            "tokenizer_sha256": prepared.content["tokenizer_digest"][:16],
        }


def test_reading_a_range_gives_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert b"".join(read_range(str(tmp_path / "x"), 10, 60, 7)) == bytes(range(10, 60))


def test_a_full_standard_output_is_one_line(corpus: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ran = subprocess.run(
            prepare_command(corpus, tmp_path, "--num_proc", "0"),
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            env=env,
        )
    assert ran.returncode == 74
    assert (
        ran.stderr.splitlines()[-1] == "error: standard output: No space left on device; what was printed is not whole"
    )
    assert "Traceback" not in ran.stderr
