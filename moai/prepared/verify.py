"""Check a prepared directory, or an entity-coref corpus, against its manifest.

    python -m moai verify DIR            a look: manifest, sizes, unknown files, rows and columns of every shard, a
                                         decoded sample
    python -m moai verify DIR --full     every byte: hashes, every token id, every row's pieces; no changed bit passes

Both exit with 65 if a check fails. What has another hash than the manifest says is not looked into any further.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.errors import DamagedError, TokenizerError
from moai.core.files import digest_file
from moai.coref import verify as verify_corpus
from moai.engine.documents import schema as documents_schema
from moai.engine.schema import TRAINED, Column, arrow_schema, columns_from_json
from moai.prepared.checks import Check, count_rows
from moai.prepared.formats import ENTITY_COREF, FORMATS
from moai.prepared.manifest import HELD_OUT, MANIFEST, Prepared, listed_files
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer

_SAMPLE_TOKENS = 60


def verify(path: Path, *, full: bool = True) -> Iterator[Check]:
    """Checks of one directory, as they finish. The first one fails alone when there is no usable manifest."""
    try:
        prepared = Prepared.open(path, recipe=None)
    except DamagedError as error:
        yield Check("manifest and sizes", False, str(error))
        return
    held_out = prepared.held_out
    yield from _side(prepared, {MANIFEST, HELD_OUT} if held_out else {MANIFEST}, full=full)
    if held_out:
        yield from (
            Check(f"held out: {check.name}", check.ok, check.detail) for check in _side(held_out, set(), full=full)
        )


def _side(prepared: Prepared, own: set[str], *, full: bool) -> Iterator[Check]:
    """Checks of one manifest. `own` are the names in its directory that it does not list."""
    path, content = prepared.path, prepared.content
    shards = [shard for shard in content["shards"] if shard["file"]]
    yield Check(
        "manifest and sizes",
        True,
        f"{len(shards)} shards, {sum(s['bytes'] for s in shards):,} bytes, content {prepared.content_digest[:16]}",
    )
    wrong: list[str] = []
    if full:
        wrong = damaged(prepared)
        yield Check("hashes", not wrong, _said(wrong) if wrong else f"xxh3_128 of {len(listed_files(content))} files")
    yield _files(path, content, own, wrong)
    whole = [shard for shard in shards if shard["file"] not in wrong]
    if content["recipe"] == ENTITY_COREF:
        yield from verify_corpus.checks(prepared, whole, wrong, full=full)
        return
    yield from _rows(path, whole, content, full=full, some=bool(wrong))
    if full:
        yield _documents(path, content, wrong)
    yield _conservation(content)
    if "tokenizer.json" not in wrong and shards and shards[0]["file"] not in wrong:
        yield _sample(path, shards[0], content)


def damaged(prepared: Prepared) -> list[str]:
    """The files of an opened directory whose bytes are not those of its manifest, in its order."""
    return [
        entry["file"]
        for entry in listed_files(prepared.content)
        if digest_file(prepared.path / entry["file"]) != entry["xxh3_128"]
    ]


def _said(wrong: Sequence[str]) -> str:
    return f"{len(wrong)} differ from the manifest: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}"


def _files(path: Path, content: dict[str, Any], own: set[str], wrong: Sequence[str]) -> Check:
    folders = FORMATS[content["recipe"]].folders
    listed = {entry["file"] for entry in listed_files(content)} | own | FORMATS[content["recipe"]].unlisted
    used = [folder for folder in folders if any(name.startswith(f"{folder}/") for name in listed)]
    there = [*(p.name for p in path.iterdir() if p.name not in used)]
    there += [f"{folder}/{p.name}" for folder in used for p in (path / folder).iterdir()]
    if unknown := sorted(name for name in there if name not in listed):
        return Check("files", False, f"unknown files {unknown[:5]}")
    places = [f"{folder}/" for folder in used] or [""]
    wanted = ["tokenizer.json", *(f"{place}{name}" for place in places for name in ("state.json", "dataset_info.json"))]
    if absent := next((name for name in wanted if name not in listed), None):
        return Check("files", False, f"the manifest lists no {absent}")
    for place in places:
        name = f"{place}state.json"
        if name in wrong:
            continue
        try:
            state = [entry["filename"] for entry in json.loads((path / name).read_bytes())["_data_files"]]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            return Check("files", False, f"{name} is not as `datasets` writes it ({type(error).__name__})")
        shards = [shard["file"] for shard in content["shards"] if shard["file"] and shard["file"].startswith(place)]
        if state != [shard.removeprefix(place) for shard in shards]:
            return Check("files", False, f"{name} lists other shards than the manifest")
    return Check("files", True, "none that is not listed" if wrong else "as listed")


@dataclass
class _Totals:
    """What was counted over all shards."""

    tokens: int = 0
    highest: int = -1
    trained: int = 0
    bad_rows: int = 0


def _rows(
    path: Path, shards: Sequence[dict[str, Any]], content: dict[str, Any], *, full: bool, some: bool
) -> Iterator[Check]:
    """`some`: not all shards are looked at, so that totals say nothing."""
    totals = _Totals()
    columns = columns_from_json(content["columns"])
    schema = arrow_schema(columns)
    try:
        rows, differing = count_rows(
            path, shards, schema, partial(_look_at, content=content, columns=columns, totals=totals) if full else None
        )
    except DamagedError as error:
        yield Check("readable", False, str(error))
        return
    if not some and rows != content["rows"]:
        differing.append(f"{rows:,} rows in all, the manifest says {content['rows']:,}")
    yield Check(
        "rows", not differing, "; ".join(differing[:5]) or f"{rows:,} rows, fill rate {content['fill_rate']:.4f}"
    )
    if full:
        pieces = f"{totals.bad_rows} rows whose lengths do not add up to their tokens" if totals.bad_rows else None
        yield Check(
            "pieces", not totals.bad_rows, pieces or f"every row's pieces add up, none over {content['seq_len']}"
        )
        yield Check(
            "token range",
            totals.highest < content["vocab_size"],
            f"highest id {totals.highest}, vocabulary {content['vocab_size']}",
        )
        yield Check(
            "tokens",
            some or totals.tokens == content["tokens"],
            f"{totals.tokens:,}, the manifest says {content['tokens']:,}",
        )
        if TRAINED in columns:
            said = content["token_counts"].get("trained", 0)
            yield Check(
                "trained",
                some or totals.trained == said,
                f"{totals.trained:,} tokens are learned, the manifest says {said:,}",
            )


def _look_at(batch: pa.RecordBatch, content: dict[str, Any], columns: Sequence[Column], totals: _Totals) -> None:
    ids, pieces = batch["input_ids"], batch["seq_lengths"]
    if ids.null_count or pieces.null_count or ids.values.null_count or pieces.values.null_count:
        raise DamagedError("nulls among the rows")
    lengths = np.diff(ids.offsets.to_numpy())
    ends = np.concatenate(([0], np.cumsum(pieces.values.to_numpy(), dtype=np.int64)))
    offsets = pieces.offsets.to_numpy()
    summed = ends[offsets[1:]] - ends[offsets[:-1]]
    totals.bad_rows += int(((summed != lengths) | (lengths > content["seq_len"]) | (lengths == 0)).sum())
    for column in columns[2:]:
        values = batch[column.name]
        if column.runs:
            _trained_of(values, lengths, totals)
        elif column.per in ("piece", "token"):
            wanted = lengths if column.per == "token" else pieces.value_lengths().to_numpy()
            totals.bad_rows += values.null_count or int((values.value_lengths().to_numpy() != wanted).sum())
    flat = ids.flatten()
    totals.highest = max(totals.highest, pc.max(flat).as_py() or 0)
    totals.tokens += len(flat)


def _documents(path: Path, content: dict[str, Any], wrong: Sequence[str]) -> Check:
    """Every document has a fate: kept ones are as many as the shard says, and their tokens too."""
    differing, number = [], 0
    for shard in content["shards"]:
        name = shard["documents_file"]["file"]
        if name in wrong:
            continue
        try:
            with pa.memory_map(str(path / name)) as file:
                table = pa.ipc.open_file(file).read_all()
        except (pa.ArrowException, OSError) as error:
            return Check("documents", False, f"{name}: {' '.join(str(error).split())[:160]}")
        if (
            table.schema.names[: len(documents_schema())] != documents_schema().names
            or table["reason"].null_count != shard["documents"]
        ):
            differing.append(name)
        number += table.num_rows
    return Check(
        "documents",
        not differing,
        f"{', '.join(differing[:5])}: not the documents of the shard"
        if differing
        else f"the fate of {number:,} documents",
    )


def _trained_of(runs: pa.Array, lengths: np.ndarray, totals: _Totals) -> None:
    """Every row's runs add up to its tokens, the first of which is not learned; every second run is."""
    if runs.null_count or runs.values.null_count:
        raise DamagedError("nulls among the trained_runs")
    values, offsets = runs.values.to_numpy().astype(np.int64), runs.offsets.to_numpy()
    numbers = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    ends = np.concatenate(([0], np.cumsum(values)))
    wrong = (ends[offsets[1:]] - ends[offsets[:-1]] != lengths) | (np.diff(offsets) == 0)
    totals.bad_rows += int(wrong.sum()) + int((values == 0).any())
    totals.trained += int(values[numbers % 2 == 1].sum())


def _conservation(content: dict[str, Any]) -> Check:
    records, tokens = content["records"], content["token_counts"]
    ok = records["read"] == records["kept"] + records["filtered"] + records["quarantined"]
    made = tokens["text"] + tokens["eos"] + tokens.get("bos", 0)
    ok = ok and made == tokens["rows"] + tokens.get("dropped", 0)
    said = (
        f"{records['read']:,} read = {records['kept']:,} kept + {records['filtered']:,} filtered + "
        f"{records['quarantined']:,} quarantined"
    )
    return Check(
        "conservation",
        ok,
        f"{said}; {made:,} tokens in = {tokens['rows']:,} in rows + {tokens.get('dropped', 0):,} dropped",
    )


def _sample(path: Path, shard: dict[str, Any], content: dict[str, Any]) -> Check:
    try:
        spec = load_tokenizer(str(path / "tokenizer.json"), eos_token=content["tokenizer"]["eos_token"])
    except TokenizerError as error:
        return Check("sample", False, str(error))
    if spec.digest != content["tokenizer_digest"]:
        return Check("sample", False, "tokenizer.json is not the one that made the ids")
    with pa.memory_map(str(path / shard["file"])) as file:
        first = next(iter(pa.ipc.open_stream(file)), None)
        ids = (
            first["input_ids"].slice(0, 1).flatten()[:_SAMPLE_TOKENS].to_pylist()
            if first is not None and first.num_rows
            else []
        )
    if any(index >= spec.vocab_size for index in ids):
        return Check("sample", False, f"an id of the first row is beyond the vocabulary of {spec.vocab_size}")
    return Check("sample", True, repr(Reference(spec=spec).decode(ids)))
