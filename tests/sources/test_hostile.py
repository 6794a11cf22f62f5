"""Manifests and directories that were cut, changed or made to harm: one clear error, at once, and never a path
outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.cache.leases import read_owner
from moai.core.errors import DamagedError, MoaiError
from moai.core.files import digest_json
from moai.prepared.manifest import MANIFEST, Prepared, _rendered, read_manifest
from moai.prepared.verify import verify
from moai.pretraining.keys import find_plan, plans

PrepareIt = Callable[..., Prepared]

pytestmark = pytest.mark.timeout(60)  # a FIFO that is waited for, or a device that is read, ends here


@pytest.fixture
def made(tmp_path: Path, prepare: PrepareIt) -> Path:
    """A small prepared directory with two shards and a quarantined record."""
    lines = [json.dumps({"text": f"document {number} " + "word " * 30}) for number in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": broken']) + "\n")
    return prepare(tmp_path / "a.jsonl", shard_bytes=1200).path


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that someone changed who knows how its digests are made."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    del manifest["self_digest"]
    change(manifest)
    manifest["content_digest"] = digest_json(manifest["content"])
    manifest["self_digest"] = digest_json(manifest)
    (directory / MANIFEST).write_bytes(_rendered(manifest))


def refused(directory: Path) -> str:
    """What opening says; `verify` must say it too."""
    with pytest.raises(DamagedError) as raised:
        Prepared.open(directory)
    [check] = verify(directory)
    assert not check.ok
    assert check.detail == str(raised.value)
    return str(raised.value)


def test_a_manifest_cut_at_every_byte_is_refused(made: Path) -> None:
    file = made / MANIFEST
    whole = file.read_bytes()
    for size in reversed(range(len(whole))):
        os.truncate(file, size)
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            read_manifest(made)
    file.write_bytes(whole)
    assert len(whole) > 1000
    read_manifest(made)


def test_every_bit_of_a_manifest_counts(made: Path) -> None:
    file = made / MANIFEST
    whole = bytearray(file.read_bytes())
    for index in range(
        0, len(whole) * 8, 11
    ):  # 11 and 8 have no common divisor: every byte and every bit of a byte has its turn
        whole[index // 8] ^= 1 << index % 8
        file.write_bytes(whole)
        with pytest.raises(DamagedError):
            read_manifest(made)
        whole[index // 8] ^= 1 << index % 8


def test_another_spelling_of_the_same_manifest_is_refused(made: Path) -> None:
    manifest = json.loads((made / MANIFEST).read_bytes())
    (made / MANIFEST).write_text(json.dumps(manifest))
    assert "does not match its own digest" in refused(made)


NAMES = [
    "../outside.arrow",
    "/etc/passwd",
    "sub/dir.arrow",
    "..",
    ".",
    "",
    ".hidden",
    "a\0b",
    "x" * 201,
    "x" * 100_000,
    "data-\u0430.arrow",
    "data\u2215x.arrow",
    "data-00000-of-00002.arrow\n",
    "con\u202etrol",
    "-rf",
    "~root",
    "\U0001f600.arrow",
]


@pytest.mark.parametrize("place", ["shards", "files"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_a_name_that_is_not_plain_is_refused(made: Path, place: str, name: str) -> None:
    (made.parent / "outside.arrow").write_bytes(b"")
    rewrite(made, lambda manifest: manifest["content"][place][0].update(file=name, bytes=0))
    assert "is not a plain name" in refused(made)


SHAPES: list[Callable[[dict[str, Any]], object]] = [
    lambda content: content.update(shards=None),
    lambda content: content.update(shards={}),
    lambda content: content.update(shards=[[]]),
    lambda content: content["shards"][0].update(file=7),
    lambda content: content["shards"][0].update(file=["a"]),
    lambda content: content["shards"][0].pop("xxh3_128"),
    lambda content: content["shards"][0].update(bytes=-1),
    lambda content: content["shards"][0].update(bytes=1.5),
    lambda content: content["shards"][0].update(rows=True),
    lambda content: content["shards"][0].update(rows="9"),
    lambda content: content["shards"][0].update(file=None),
    lambda content: content["columns"][0].update(type="object"),
    lambda content: content.update(columns=["uint16"]),
    lambda content: content.update(records=3),
    lambda content: content["token_counts"].update(bos="many"),
    lambda content: content["files"].append(content["files"][0]),
    lambda content: content["files"].append({"file": MANIFEST, "bytes": 1, "xxh3_128": ""}),
    lambda content: content.update(tokenizer=None),
    lambda content: content.pop("vocab_size"),
    lambda content: content.update(seq_len=None),
    lambda content: content.update(format_version=99),
    lambda content: content.update(format_version={"a": [1]}),
    lambda content: content.clear(),
]


@pytest.mark.parametrize("change", SHAPES)
def test_a_manifest_of_another_shape_is_refused_with_the_place(
    made: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(made, lambda manifest: change(manifest["content"]) and None)
    refused(made)


TEXTS = [
    b"",
    b"\0" * 1_000_000,
    b"[" * 1_000_000,
    b'{"a":' * 100_000,
    b"9" * 1_000_000,
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"self_digest": 1}',
    b"\xff\xfe{}",
    b'{"self_digest": "", "content": {"x": NaN}, "content_digest": ""}',
    b'{"self_digest": "\\ud800", "content": [], "content_digest": ""}',
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_what_is_no_manifest_is_refused(made: Path, text: bytes) -> None:
    (made / MANIFEST).write_bytes(text)
    assert str(made / MANIFEST) in refused(made)


def test_a_manifest_too_large_for_memory_is_not_read(made: Path) -> None:
    os.truncate(made / MANIFEST, 1 << 40)
    assert "larger than" in refused(made)


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.mkdir()


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(path.parent)  # the name of a socket is short
        listening.bind(path.name)


def as_link(path: Path) -> None:
    """To a file outside that holds just what is asked for."""
    path.symlink_to(path.parent.parent / "copy" / path.name)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [MANIFEST, "data-00000-of-00002.arrow", "tokenizer.json"])
@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (as_fifo, "a FIFO"),
        (as_directory, "a directory"),
        (as_socket, "a socket|No such device"),
        (as_link, "a symbolic link"),
        (as_device, "a symbolic link"),
    ],
)
def test_what_is_no_regular_file_is_neither_waited_for_nor_followed(
    made: Path, monkeypatch: pytest.MonkeyPatch, name: str, replace: Callable[[Path], None], said: str
) -> None:
    monkeypatch.chdir(made)  # put back at the end
    shutil.copytree(made, made.parent / "copy")
    (made / name).unlink()
    replace(made / name)
    message = refused(made)
    assert str(made / name) in message
    assert any(kind in message for kind in said.split("|")), message


@pytest.mark.parametrize(
    "put",
    [as_fifo, as_socket, lambda path: path.write_bytes(b"x"), lambda path: None],
    ids=["fifo", "socket", "file", "nothing"],
)
def test_what_is_no_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "it")
    with pytest.raises(DamagedError, match="it"):
        Prepared.open(tmp_path / "it")


def test_a_name_with_a_null_and_one_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(DamagedError):
            Prepared.open(tmp_path / name)


@given(data=st.binary(max_size=400))
def test_bytes_that_nobody_thought_of_are_refused(made: Path, data: bytes) -> None:
    (made / MANIFEST).write_bytes(data)
    with pytest.raises(MoaiError):
        Prepared.open(made)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, steps=st.lists(st.integers(0, 30), max_size=4))
def test_a_value_put_anywhere_into_a_manifest_gives_a_moai_error_or_the_same_files(
    made: Path, value: Any, steps: list[int]
) -> None:
    """Whoever can make digests can change anything: what opens still names only its own files, and `verify` gets to its
    end.
    """
    original = (made / MANIFEST).read_bytes()
    rewrite(made, lambda manifest: put(manifest["content"], steps, value))
    with contextlib.suppress(MoaiError):
        prepared = Prepared.open(made)
        assert {entry["file"] for entry in prepared.content["shards"]} <= {*os.listdir(made), None}
    assert list(verify(made))
    (made / MANIFEST).write_bytes(original)


def put(inside: Any, steps: list[int], value: Any) -> None:
    """Replace the value that these steps lead to."""
    for last, step in enumerate(steps, 1):
        keys = (
            sorted(inside) if isinstance(inside, dict) else list(range(len(inside))) if isinstance(inside, list) else []
        )
        if not keys:
            return
        key = keys[step % len(keys)]
        if last == len(steps):
            inside[key] = value
        inside = inside[key]


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        b'{"fields": {}, "directory": "x", "trusted": true}',
        b'{"fields": {"config": {}, "tokenizer": {}, "format": {}, "files": {}}, "directory": "../x", "trusted": true}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_damaged_plan_record_counts_as_absent(tmp_path: Path, made: Path, prepare: PrepareIt, text: bytes) -> None:
    [(path, _)] = plans(tmp_path / "cache")
    path.write_bytes(text)
    assert find_plan(tmp_path / "cache", path.stem) is None
    assert list(plans(tmp_path / "cache")) == []
    assert read_owner(path) is None
    assert prepare(tmp_path / "a.jsonl", shard_bytes=1200).path == made  # made again from the finished shards
