"""Files that other projects made to find out whether a reader is right, where this machine has them: zero wrong.

They lie beside the project (or where MOAI_CONFORMANCE says) with an `expected.json`; none of them is part of it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from reading import Read, read, read_apart

ROOT = Path(__file__).parents[2]
FILES = Path(os.environ.get("MOAI_CONFORMANCE", ROOT.parent / "shared" / "conformance"))
GOOD = [f"good {number}" for number in range(1, 4)]

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not there (MOAI_CONFORMANCE names another)")


def expected(folder: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    files = json.loads((FILES / "expected.json").read_text())[folder]
    assert files, f"{FILES}/expected.json lists no {folder}"
    for name, what in files.items():
        yield FILES / name, what


def report(folder: str, found: Counter[bool], wrong: list[str]) -> None:
    """The table, seen with -rP; what is wrong fails."""
    print(f"{folder}: {found.total()} cases, {found[True]} right, {found[False]} wrong")
    assert found.total() > 0
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


def judged(folder: str, cases: Iterator[tuple[str, bool]]) -> None:
    found: Counter[bool] = Counter()
    wrong = []
    for name, is_right in cases:
        found[is_right] += 1
        if not is_right:
            wrong.append(name)
    report(folder, found, wrong)


# ---- json


def good(number: int) -> bytes:
    return json.dumps({"text": GOOD[number]}).encode()


def in_line(path: Path, document: bytes) -> Read:
    path.write_bytes(b"\n".join([good(0), good(1), document, good(2), b""]))
    return read(path)


def is_right(found: Read, rule: str, text: str) -> bool:
    """As a line: kept, or one bad record in line 3; the neighbours live."""
    kept = found == Read([*GOOD[:2], text, GOOD[2]], [], "", 4)
    bad = found.texts == GOOD and [line for line, _ in found.bad] == [2] and not found.error
    return {"accept": kept, "refuse": bad, "either": kept or bad}[rule]


def is_right_in_file(found: Read, rule: str, text: str) -> bool:
    """In an array or among values: the same, but the run may also end with the file and line of what is broken."""
    named = bool(re.search(r"line 3: ", found.error))
    kept = found.texts == [*GOOD[:2], text, GOOD[2]] and not found.bad and not found.error
    bad = found.texts == GOOD and bool(found.bad) and not found.error
    return {"accept": kept, "refuse": named or bad, "either": kept or named or bad}[rule]


def json_cases(folder: Path) -> Iterator[tuple[str, bool]]:
    for path, what in expected("json"):
        data, name = path.read_bytes(), path.name
        wrapped = b'{"text": %s, "v": %s}' % (json.dumps(f"wrapped {name}").encode(), data)
        values = [good(0), good(1), wrapped, good(2)]
        if what["one_line"]:
            found = in_line(folder / "raw.jsonl", data)
            no_text = {reason for _, reason in found.bad} <= {"no text", "not an object"}
            right = is_right(found, "refuse", "")
            if what["raw_line"] != "refused":
                right = right and no_text == (what["raw_line"] == "refused: no text")
            if what["raw_line"] == "no record":
                right = found == Read(GOOD, [], "", 3)
            yield f"{name} raw", right
            yield (
                f"{name} wrapped",
                is_right(in_line(folder / "wrapped.jsonl", wrapped), what["wrapped_line"], f"wrapped {name}"),
            )
        if "as_text" in what:
            inner = data.strip()[1:-1] if data.strip().endswith(b"]") else data
            found = in_line(folder / "text.jsonl", b'{"text": %s}' % inner)
            text = (what["as_text"] or {}).get("text", "")
            yield f"{name} as text", is_right(found, what["wrapped_line"], text)
        for way, whole in (("array", b"[%s]" % b",\n".join(values)), ("values", b"\n".join(values))):
            (folder / f"{way}.json").write_bytes(whole)
            yield (
                f"{name} {way}",
                is_right_in_file(read(folder / f"{way}.json"), what["array"], f"wrapped {name}"),
            )


def test_json_documents_are_accepted_or_refused_and_no_neighbour_is_lost(tmp_path: Path) -> None:
    judged("json", json_cases(tmp_path))


# ---- arrow, parquet and zstd, in another process: one wrong turn of a library would end this one


def asked(folder: str, ending: str, tmp_path: Path) -> Iterator[tuple[dict[str, Any], str | None, Read]]:
    """(what is expected, the column named, what became of it) by default and for each column."""
    cases = []
    for number, (path, what) in enumerate(expected(folder)):
        copy = tmp_path / f"{number}{ending}"
        shutil.copyfile(path, copy)
        columns = [column["name"] for column in what.get("columns", ())]
        columns += [*what.get("columns that read", ()), *what.get("columns that do not", ())]
        for column in [None, *dict.fromkeys(columns)]:
            cases.append((what | {"path": path}, copy, column))
    for (what, copy, column), (found, _) in zip(cases, read_apart((copy, column) for _, copy, column in cases)):
        assert not found.error or (copy.name in found.error or "the data" in found.error), found.error
        yield what, column, found


def arrow_cases(tmp_path: Path) -> Iterator[tuple[str, bool]]:
    for what, name, found in asked("arrow", ".arrow", tmp_path):
        case = f"{what['path'].parent.name}/{what['path'].name} {name}"
        if name is None:
            yield case, bool(found.error)
            continue
        (column, *others) = [column for column in what["columns"] if column["name"] == name]
        if column["as_text_column"] == "read":
            values = pa.ipc.open_stream(what["path"]).read_all()[name].to_pylist()
            texts = [value for value in values if value is not None]
            assert (len(texts), values.count(None)) == (column["texts"] + column["blank"], column["nulls"])
            yield case, found.texts == texts and len(found.bad) == column["nulls"] and not found.error
        elif others:
            yield case, "2 columns of one name" in found.error
        else:
            yield case, column["type"].split("<")[0] in found.error and name in found.error and not found.count


def test_arrow_columns_equal_those_of_the_reference_or_are_refused_by_type(tmp_path: Path) -> None:
    judged("arrow", arrow_cases(tmp_path))


def parquet_cases(tmp_path: Path) -> Iterator[tuple[str, bool]]:
    for what, name, found in asked("parquet", ".parquet", tmp_path):
        case = f"{what['path'].name} {name}"
        of_name = [column for column in what.get("columns", ()) if column["name"] == name]
        if name in what.get("columns that read", ()):
            values = what["columns that read"][name]
            yield case, found.texts == [value for value in values if value is not None] and len(found.bad) == 1
        elif of_name and of_name[0].get("encrypted"):
            yield case, "encrypted" in found.error and name in found.error
        elif of_name and of_name[0].get("as_text_column") == "read":
            with open(what["path"].with_name("delta_byte_array_expect.csv"), newline="") as file:
                texts = [row[name] for row in csv.DictReader(file) if row[name]]
            yield case, found.texts == texts and len(found.bad) == of_name[0]["nulls"] and not found.error
        else:
            yield case, bool(found.error) and not found.texts


def test_parquet_is_read_or_refused_in_one_line_and_never_ends_the_process(tmp_path: Path) -> None:
    judged("parquet", parquet_cases(tmp_path))
    (path,) = (path for path, what in expected("parquet") if "texts" in what)
    shutil.copyfile(path, tmp_path / "two-bad.parquet")
    found = read(tmp_path / "two-bad.parquet", text_column="c_customer_id")
    assert (len(found.texts), Counter(reason for _, reason in found.bad)) == (998, {"invalid UTF-8": 2})


def zstd_cases(tmp_path: Path) -> Iterator[tuple[str, bool]]:
    for number, (path, what) in enumerate(expected("zstd")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.txt").write_text("\n".join(GOOD))
        shutil.copyfile(path, folder / "b.txt.zst")
        found = read(folder)
        texts = [*GOOD, *what.get("text", "").splitlines()]
        right = "b.txt.zst: " in found.error if what["rule"] == "refuse" else found == Read(texts, [], "", len(texts))
        yield path.name, right


def test_zstd_edges_decompress_to_the_text_or_are_refused(tmp_path: Path) -> None:
    judged("zstd", zstd_cases(tmp_path))
