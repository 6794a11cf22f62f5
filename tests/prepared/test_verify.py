"""`moai verify`: a quick look by default, every byte with --full."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify

PrepareIt = Callable[..., Prepared]


@pytest.fixture
def made(tmp_path: Path, prepare: PrepareIt) -> Path:
    lines = [json.dumps({"text": f"document {number} " + f"words {number * 7919} " * 10}) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    return prepare(tmp_path / "a.jsonl", shard_bytes=2000, seq_len=32, packing="bfd_split").path


def is_found(directory: Path) -> bool:
    """Up to the first check that fails: later ones may not be reached with damage that was named already."""
    return any(not check.ok for check in verify(directory))


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(made: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(made.iterdir())))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    flip(path, bit)
    assert is_found(made)
    flip(path, bit)


@pytest.mark.long
def test_ten_thousand_flipped_bits_are_all_found(made: Path, record: Callable[..., None]) -> None:
    """Over all bytes of the directory alike."""
    files = [(path, path.stat().st_size * 8) for path in sorted(made.iterdir())]
    choose = random.Random(1)
    found = 0
    for path, bits in choose.choices(files, weights=[bits for _, bits in files], k=10_000):
        bit = choose.randrange(bits)
        flip(path, bit)
        found += is_found(made)
        flip(path, bit)
    record("a flipped bit in a prepared directory", 10_000, f"{found:,} found by full verification")
    assert found == 10_000
    assert not is_found(made)


def test_full_goes_on_behind_a_damaged_shard_and_does_not_look_into_it(made: Path) -> None:
    [first, *_] = sorted(made.glob("data-*.arrow"))
    flip(first, first.stat().st_size * 4)
    checks = {check.name: check for check in verify(made)}
    assert [name for name, check in checks.items() if not check.ok] == ["hashes"]
    assert first.name in checks["hashes"].detail
    assert checks["pieces"].ok


def test_the_quick_look_reads_no_bytes_of_the_rows_and_full_reads_all(made: Path) -> None:
    [first, *_] = sorted(made.glob("data-*.arrow"))
    flip(first, first.stat().st_size * 4)
    assert all(check.ok for check in verify(made, full=False))
    assert is_found(made)
    os.truncate(first, first.stat().st_size - 8)
    assert [check.ok for check in verify(made, full=False)] == [False]


def test_a_file_that_is_not_listed_is_named(made: Path) -> None:
    (made / "extra.arrow").touch()
    for full in (False, True):
        assert [check.detail for check in verify(made, full=full) if not check.ok] == ["unknown files ['extra.arrow']"]


def test_the_command_says_which_it_was(made: Path, run_moai: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    quick, full = run_moai("verify", made), run_moai("verify", made, "--full")
    assert (quick.returncode, full.returncode) == (0, 0)
    assert quick.stdout.splitlines()[-1] == "all 5 checks passed; --full hashes every byte"
    assert full.stdout.splitlines()[-1] == "all 10 checks passed"
    (made / "tokenizer.json").unlink()
    failed = run_moai("verify", made)
    assert failed.returncode == 65
    assert failed.stdout.splitlines()[-1] == "1 of 1 checks FAILED"
