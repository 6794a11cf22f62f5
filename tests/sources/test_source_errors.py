"""Damaged, changing, forbidden and absent input: one clear line each, and never a record left out in silence."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_sources import LINES, ROOT, TABLE, WRITERS, digest_by_reading, save_arrow, source_of

from moai.core.errors import SourceError
from moai.engine.pipeline import Meter
from moai.prepared.manifest import Prepared

PrepareIt = Callable[..., Prepared]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zst": zstandard.ZstdCompressor().compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


# ---- damaged and changing input


@pytest.mark.parametrize("ending", ["zst", "gz"])
def test_a_compressed_file_cut_anywhere_is_refused_or_ends_with_a_frame(tmp_path: Path, ending: str) -> None:
    pack = zstandard.ZstdCompressor().compress if ending == "zst" else gzip.compress
    frames = [pack(LINES[:200]), pack(LINES[200:500])]
    whole = b"".join(frames)
    passed: list[int] = []
    said: set[str] = set()
    path = tmp_path / f"cut.jsonl.{ending}"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        source = source_of(path, tmp_path, trust_stamps=False)
        try:
            for shard in source.shards():
                digest_by_reading(source, shard)
            passed.append(size)
        except SourceError as error:
            said.add(str(error))
    assert passed == [len(frames[0])]
    assert said
    assert all(message.startswith(f"{path}: the") and "ends early" in message for message in said)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.zst", PACKERS["zst"](LINES) + b"\0" * 9, "from byte"),
        ("a.jsonl.zst", b"no zstd at all", "not readable as zstd"),
        (
            "a.jsonl.gz",
            b"no gzip at all",
            "not readable as gzip: it begins with b'no gzip at all'; if it is not compressed",
        ),
        ("a.jsonl.bz2", b"x", "not readable as bz2: it begins with b'x'"),
        ("a.jsonl.xz", LINES, "not readable as xz: it begins with"),
        *(
            (
                f"a.jsonl.{ending}",
                pack(LINES) * 2 + behind,
                f"what stands behind its last member, from byte {2 * len(pack(LINES)):,}, is none",
            )
            for ending, pack in PACKERS.items()
            for behind in (b"\n", b"rubbish" * 1000)
        ),
        ("a.jsonl.gz", gzip.compress(LINES)[:-4] + b"\0\0\0\1", "not readable as gzip"),
        ("a.json.zst", b"\x28\xb5\x2f\xfd", "ends early"),
        ("a.parquet", b"PAR1 and not much else PAR1", "not readable as Parquet"),
        ("a.parquet", b"x", "not readable as Parquet"),
        ("a.arrow", b"no arrow at all, none", "not readable as Arrow"),
        ("a.arrow", b"x", "not readable as Arrow"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_clear_line(
    tmp_path: Path, prepare: PrepareIt, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=message) as failed:
        prepare(tmp_path / name)
    assert name in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_parquet_file_cut_or_damaged_inside_is_refused(tmp_path: Path, prepare: PrepareIt) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=50, compression="zstd")
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match="not readable as Parquet"):
            prepare(path)
    path.write_bytes(whole[:1000] + bytes(500) + whole[1500:])
    with pytest.raises(SourceError, match=r"row group \d is not readable"):
        prepare(path)


def test_an_arrow_file_cut_at_any_batch_or_inside_one_is_refused(tmp_path: Path, prepare: PrepareIt) -> None:
    path = tmp_path / "a.arrow"
    save_arrow(path, TABLE, rows=50)
    whole = path.read_bytes()
    ends = []
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        with contextlib.suppress(StopIteration):
            while True:
                reader.read_next_batch()
                ends.append(file.tell())
    assert len(ends) == 6
    for size in (*ends, *(end - 8 for end in ends), ends[0] + 4):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"no end marker|not readable"):
            prepare(path)


def test_arrow_offsets_that_lead_nowhere_are_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, run_moai: Callable[..., Any], tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.arrow"
    save_arrow(path, pa.table({"text": ["a" * 100, "b" * 100, "c" * 100]}))
    data = path.read_bytes()
    offsets = np.array([0, 100, 200, 300], np.int32).tobytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 2**31 - 1, 200, 300], np.int32).tobytes()))
    ended = run_moai(
        "prepare",
        "--dataset",
        path,
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "cache",
        "--num_proc",
        0,
    )
    assert ended.returncode == 66
    assert "record batch 0 is not readable" in ended.stderr.splitlines()[-1]


def test_no_more_rows_of_an_arrow_file_are_taken_at_once_than_fit_the_batch(tmp_path: Path) -> None:
    save_arrow(tmp_path / "a.arrow", pa.table({"text": ["x" * 10_000] * 100}), rows=100)
    source = source_of(tmp_path / "a.arrow", tmp_path, batch_bytes=100_000, shard_bytes=16_000_000)
    rows = [batch.num_rows for shard in source.shards() for batch in source.read(shard, Meter())]
    assert sum(rows) == 100
    assert max(rows) <= 10


@pytest.mark.parametrize("change", ["append", "replace", "delete", "touch", "none"])
@pytest.mark.parametrize("name", ["a.jsonl", "frames.jsonl.zst", "array.json", "groups.parquet", "a.arrow"])
def test_a_file_that_changes_while_it_is_read_ends_the_run(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    source = source_of(path, tmp_path, shard_bytes=16_000_000, batch_rows=10)
    (shard,) = source.shards()
    batches = source.read(shard, Meter())
    next(batches)
    if change == "append":
        with open(path, "ab") as file:
            file.write(b"\n")
    elif change == "replace":
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
    elif change == "touch":
        os.utime(path, ns=(10**18, 10**18))
    elif change == "none":  # what a backup, a mirror or `chmod -R` does beside
        os.link(path, tmp_path / "link")
        path.chmod(0o640)
        assert os.stat(path).st_ctime_ns != source.files[0].stamp.ctime_ns
        assert list(batches)
        return
    else:
        path.unlink()
    with pytest.raises(SourceError, match=r"changed while it was read|No such file") as failed:
        list(batches)
    assert name in str(failed.value)


# ---- what there is nothing to read from


def make_nothing(folder: Path) -> dict[str, str]:
    """Inputs by what the error must say of them."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty.jsonl").touch()
    for name in ("blank.jsonl", "blank.json"):
        (folder / name).write_text("\n \n\n")
    (folder / "brackets.json").write_text("[ ]")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "blank.txt").write_text("\n\n\n")
    (folder / "table.xlsx").write_text("text\na\n")
    (folder / "run.yaml").write_text("seq_len: 256\n")
    (folder / "packed.parquet.gz").write_bytes(b"x")
    pq.write_table(TABLE.slice(0, 0), folder / "no-rows.parquet")
    for name in ("nothing", "only-others", "only-pipes", "only-empty"):
        (folder / name).mkdir()
    (folder / "only-others" / "README.md").write_text("words")
    os.mkfifo(folder / "only-pipes" / "a.jsonl")
    (folder / "only-empty" / "a.jsonl").touch()
    (folder / "only-empty" / "b.jsonl").touch()
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    for name, file, text in (
        ("cut-state", "state.json", "{"),
        ("odd-state", "state.json", "{}"),
        ("no-shards", "state.json", '{"_data_files": []}'),
        ("lost-shard", "state.json", '{"_data_files": [{"filename": "lost.arrow"}]}'),
        ("escape", "state.json", '{"_data_files": [{"filename": "../outside.arrow"}]}'),
        ("absolute", "state.json", '{"_data_files": [{"filename": "/etc/hosts.arrow"}]}'),
        ("dots", "state.json", '{"_data_files": [{"filename": ".."}]}'),
        ("odd-dict", "dataset_dict.json", "[]"),
        ("escape-dict", "dataset_dict.json", '{"splits": ["train", "../outside"]}'),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    save_arrow(folder / "outside.arrow")
    return {
        "pipe.jsonl": "not a regular file",
        "empty.jsonl": "the file is empty",
        "blank.jsonl": "none of its first records is a JSON object",
        "blank.json": "none of its first records is a JSON object",
        "brackets.json": "none of its first records is a JSON object",
        "packed.jsonl.gz": "none of its first records is a JSON object",
        "blank.txt": "holds no record at all",
        "no-rows.parquet": "holds no record at all",
        "table.xlsx": "unknown kind of file",
        "run.yaml": "a file of settings is named by --config",
        "packed.parquet.gz": "unknown kind of file",
        "nothing": "no readable file in this directory",
        "only-others": "no readable file in this directory",
        "only-pipes": "no readable file in this directory",
        "only-empty": "all 2 files are empty",
        "dangling.jsonl": "no such file or directory",
        "loop.jsonl": "no such file or directory",
        "absent.jsonl": "no such file or directory",
        "absent/deeper/folder": "no such file or directory",
        "*.nothing": "no file matches",
        "x" * 300 + ".jsonl": "File name too long",
        "cut-state": "not as `datasets` writes it",
        "odd-state": "not as `datasets` writes it",
        "no-shards": "lists nothing",
        "lost-shard": "No such file or directory",
        "escape": "leaves the directory",
        "absolute": "leaves the directory",
        "dots": "leaves the directory",
        "odd-dict": "not as `datasets` writes it",
        "escape-dict": "leaves the directory",
    }


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path, prepare: PrepareIt) -> None:
    for name, message in make_nothing(tmp_path).items():
        with pytest.raises(SourceError) as failed:
            prepare(tmp_path / name)
        said = str(failed.value)
        assert message in said, name
        assert Path(name).name.removeprefix("*")[:50] in said
        assert "\n" not in said
    for nothing in ("", " "):
        with pytest.raises(SourceError, match="names no data"):
            prepare(nothing)
    assert not list((tmp_path / "cache").glob("datasets/*"))


@pytest.mark.parametrize(
    ("name", "code"), [("pipe.jsonl", 66), ("absent.jsonl", 66), ("empty.jsonl", 66), ("lost-shard", 66)]
)
def test_the_command_line_gives_that_line_and_no_traceback(
    tmp_path: Path, tokenizer_dir: Path, run_moai: Callable[..., Any], name: str, code: int
) -> None:
    make_nothing(tmp_path)
    ended = run_moai(
        "prepare",
        "--dataset",
        tmp_path / name,
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "cache",
        "--num_proc",
        0,
    )
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1].startswith("python -m moai prepare: error: ")
    assert "Traceback" not in ended.stderr


_FORBIDDEN = """
    import os, sys
    from pathlib import Path
    from moai.engine.pipeline import Meter
    from moai.core.errors import SourceError
    from moai.sources.discover import discover
    from moai.sources.local import LocalSource
    os.setuid(65534)
    try:
        discover(sys.argv[1])
    except SourceError as error:
        print(error)
    (given,) = discover(sys.argv[1] + "/open.jsonl")
    places = {"cache": Path("/"), "spool_dir": Path("/")}
    source = LocalSource(name="x", kind=given.kind, files=given.files, shard_bytes=1000, trust_stamps=False, **places)
    try:
        [list(source.read(shard, Meter())) for shard in source.shards()]
    except SourceError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody who may not read")
def test_what_may_not_be_read_is_an_error_of_the_input_and_never_left_out() -> None:
    with tempfile.TemporaryDirectory() as place:  # the folders of pytest are closed to others
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        (folder / "closed" / "b.jsonl").write_text('{"text": "b"}\n')
        (folder / "open.jsonl").write_text('{"text": "a"}\n')
        for forbidden in ("closed", "open.jsonl"):
            (folder / forbidden).chmod(0)
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_FORBIDDEN), place],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
    assert ended.returncode == 0, ended.stderr
    walked, read = ended.stdout.splitlines()
    assert "closed: Permission denied" in walked
    assert "open.jsonl: not readable (Permission denied)" in read
