"""Check a prepared directory against its manifest, down to the tokens.

    python -m moai verify DIR          every check; exit 65 if one fails

Sizes and rows are what opening checks too. Here every byte is hashed, every token id is compared with the vocabulary,
every row's pieces must add up to its tokens, and a few documents are decoded for the eye.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moai.backends import Reference
from moai.errors import DamagedError, TokenizerError
from moai.files import digest_file
from moai.recipes.prepared import Prepared
from moai.tokenizer import load_tokenizer

_SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {self.detail}"


def verify(path: Path) -> Iterator[Check]:
    """Checks of one directory, as they finish. The first one fails alone when there is no usable manifest."""
    try:
        prepared = Prepared.open(path)
    except DamagedError as error:
        yield Check("manifest and sizes", False, str(error))
        return
    content = prepared.content
    shards = [shard for shard in content["shards"] if shard["file"]]
    yield Check("manifest and sizes", True, f"{len(shards)} shards, {sum(s['bytes'] for s in shards):,} bytes, content {prepared.content_digest[:16]}")
    yield _files(path, content)
    yield _hashes(path, shards + list(content["files"]))
    yield from _rows(path, shards, content)
    yield _conservation(content)
    yield _sample(path, shards, content)


def _files(path: Path, content: dict[str, Any]) -> Check:
    listed = {entry["file"] for entry in [*content["shards"], *content["files"]] if entry["file"]} | {"manifest.json"}
    unknown = sorted(p.name for p in path.iterdir() if p.name not in listed)
    state = [entry["filename"] for entry in json.loads((path / "state.json").read_bytes())["_data_files"]]
    same = state == [shard["file"] for shard in content["shards"] if shard["file"]]
    return Check(
        "files", not unknown and same, f"unknown files {unknown}" if unknown else "as listed" if same else "state.json lists other shards than the manifest"
    )


def _hashes(path: Path, entries: list[dict[str, Any]]) -> Check:
    wrong = [entry["file"] for entry in entries if digest_file(path / entry["file"]) != entry["xxh3_128"]]
    return Check("hashes", not wrong, f"{len(wrong)} differ from the manifest: {', '.join(wrong[:5])}" if wrong else f"xxh3_128 of {len(entries)} files")


def _rows(path: Path, shards: list[dict[str, Any]], content: dict[str, Any]) -> Iterator[Check]:
    highest, rows, tokens, bad_rows, bad_counts = -1, 0, 0, 0, []
    for shard in shards:
        in_shard = 0
        try:
            with pa.memory_map(str(path / shard["file"])) as file:
                for batch in pa.ipc.open_stream(file):
                    ids, pieces = batch["input_ids"], batch["seq_lengths"]
                    lengths = np.diff(ids.offsets.to_numpy())
                    summed = np.add.reduceat(np.append(pieces.flatten().to_numpy(), 0).astype(np.int64), pieces.offsets.to_numpy()[:-1])
                    bad_rows += int(((summed != lengths) | (lengths > content["seq_len"]) | (lengths == 0)).sum())
                    highest = max(highest, pc.max(ids.flatten()).as_py() or 0)
                    in_shard, tokens = in_shard + batch.num_rows, tokens + len(ids.flatten())
        except (pa.ArrowInvalid, OSError) as error:
            yield Check("readable", False, f"{shard['file']}: {' '.join(str(error).split())[:160]}")
            return
        if in_shard != shard["rows"]:
            bad_counts.append(f"{shard['file']}: {in_shard} rows, the manifest says {shard['rows']}")
        rows += in_shard
    yield Check(
        "rows", not bad_counts and rows == content["rows"], "; ".join(bad_counts) or f"{rows:,} rows, {tokens:,} tokens, fill rate {content['fill_rate']:.4f}"
    )
    yield Check(
        "pieces",
        not bad_rows,
        f"{bad_rows} rows whose seq_lengths do not add up to their tokens" if bad_rows else f"every row's pieces add up, none over {content['seq_len']}",
    )
    yield Check("token range", highest < content["vocab_size"], f"highest id {highest}, vocabulary {content['vocab_size']}")
    yield Check("tokens", tokens == content["tokens"], f"{tokens:,}, the manifest says {content['tokens']:,}")


def _conservation(content: dict[str, Any]) -> Check:
    records, tokens = content["records"], content["token_counts"]
    ok = records["read"] == records["kept"] + records["filtered"] + records["quarantined"]
    made = tokens["text"] + tokens["eos"] + tokens.get("bos", 0)
    ok = ok and made == tokens["rows"] + tokens.get("dropped", 0)
    said = f"{records['read']:,} read = {records['kept']:,} kept + {records['filtered']:,} filtered + {records['quarantined']:,} quarantined"
    return Check("conservation", ok, f"{said}; {made:,} tokens in = {tokens['rows']:,} in rows + {tokens.get('dropped', 0):,} dropped")


def _sample(path: Path, shards: list[dict[str, Any]], content: dict[str, Any]) -> Check:
    try:
        spec = load_tokenizer(str(path / "tokenizer.json"), eos_token=content["tokenizer"]["eos_token"])
    except TokenizerError as error:
        return Check("sample", False, str(error))
    if spec.digest != content["tokenizer_digest"]:
        return Check("sample", False, "tokenizer.json is not the one that made the ids")
    with pa.memory_map(str(path / shards[0]["file"])) as file:
        first = pa.ipc.open_stream(file).read_next_batch()["input_ids"][0].as_py()[:_SAMPLE_TOKENS]
    return Check("sample", True, repr(Reference(spec=spec).decode(first)))
