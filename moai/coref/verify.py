"""Check what an entity-coref corpus holds: its samples, its counters, and the file that its manifest cannot list.

Called by `moai.prepared.verify`, once manifest, sizes and hashes were looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moai.core.errors import DamagedError, TokenizerError
from moai.core.files import canonical_json
from moai.coref import publishing, statistics
from moai.coref.samples import IGNORED, SCHEMA, SPLITS
from moai.engine.schema import with_features
from moai.prepared.checks import Check, count_rows
from moai.prepared.manifest import Prepared
from moai.tokenizers.load import load_file

METADATA = "metadata.json"
_PARALLEL = ("attention_mask", "token_type_ids", "labels")
"""Columns with an entry for each token."""
_SAMPLE_TOKENS = 60


def checks(
    prepared: Prepared, shards: Sequence[Mapping[str, Any]], wrong: Sequence[str], *, full: bool
) -> Iterator[Check]:
    """Of `shards`, which are whole. Where files are `wrong`, totals say nothing."""
    content, path = prepared.content, prepared.path
    seen = _Seen(content["seq_len"], content["tokenizer"]["mask_id"], content["config"]["mode"] != "text")
    try:
        rows, differing = count_rows(path, shards, with_features(SCHEMA), seen.look if full else None)
        paths = [path / shard["file"] for shard in shards] if full and not wrong else []
        measured = statistics.as_json(statistics.measure(paths)) if paths else {}
    except DamagedError as error:
        yield Check("readable", False, str(error))
        return
    if not wrong and rows != content["rows"]:
        differing.append(f"{rows:,} rows in all, the manifest says {content['rows']:,}")
    yield Check("rows", not differing, "; ".join(differing[:5]) or f"{rows:,} samples")
    if full:
        fit = f"every label has its mask, every antecedent lies in its row, none is over {content['seq_len']} tokens"
        unfit = f"{seen.wrong} samples whose masks, labels or places do not fit one another"
        yield Check("samples", not seen.wrong, unfit if seen.wrong else fit)
        split = {name: sum(one["rows"] for one in shards if one["file"].startswith(f"{name}/")) for name in SPLITS}
        sides = f"{split['train']:,} train + {split['validation']:,} validation"
        yield Check("split", bool(wrong) or split == content["split"], sides)
        other = [name for name, value in measured.items() if json.loads(canonical_json(value)) != content[name]]
        differ = f"{', '.join(other)}: counted anew they are others"
        yield Check("figures", not other, differ if other else "lengths, distances and masks as counted anew")
    yield _conservation(content)
    yield metadata(prepared)
    if shards and "tokenizer.json" not in wrong:
        yield _sample(path, shards[0], content, seen.highest)


@dataclass
class _Seen:
    """What was counted over all samples."""

    seq_len: int
    mask_id: int
    labelled: bool
    wrong: int = 0
    highest: int = -1

    def look(self, batch: pa.RecordBatch) -> None:
        ids, labels = batch["input_ids"], batch["labels"]
        if any(column.null_count for column in (*batch.columns, ids.values, labels.values)):
            raise DamagedError("nulls among the samples")
        sizes = ids.value_lengths().to_numpy()
        if any(not np.array_equal(batch[name].value_lengths().to_numpy(), sizes) for name in _PARALLEL):
            raise DamagedError(f"{', '.join(_PARALLEL)} are not as long as input_ids")
        tokens, wanted = ids.flatten().to_numpy(), labels.flatten().to_numpy()
        asked, ends = wanted != IGNORED, np.cumsum(sizes)
        masks, unmasked = (
            np.diff(np.concatenate(([0], np.cumsum(marks)))[np.concatenate(([0], ends))])
            for marks in (asked, asked & (tokens != self.mask_id))
        )
        begin, end = batch["antecedent_begin"].to_numpy(), batch["antecedent_end"].to_numpy()
        wrong = (sizes > self.seq_len) | (begin < 0) | (begin >= end) | (end > sizes)
        wrong |= ((masks > 0) != self.labelled) | (unmasked > 0)
        self.wrong += int(wrong.sum())
        self.highest = max(self.highest, int(tokens.max(initial=-1)), int(wanted.max(initial=-1)))


def _conservation(content: Mapping[str, Any]) -> Check:
    """What is left behind each step is what was left before, without what was lost. Only the last line of the funnel
    counts something else.
    """
    try:
        sums = [*_sums(content["funnel"][:-1]), *_sums(content["mentions"])]
        samples = content["mentions"][-1][1]
    except (LookupError, ValueError, TypeError) as error:
        return Check("conservation", False, f"its counters are none ({type(error).__name__})")
    wrong = [
        f"{name}: {found:,}, the steps before leave {expected:,}" for name, expected, found in sums if expected != found
    ]
    rows, split = content["rows"], sum(content["split"].values())
    if not samples == rows == split == sum(shard["rows"] for shard in content["shards"]):
        wrong.append(f"{samples:,} samples, {rows:,} rows, {split:,} in the split")
    right = f"{content['funnel'][0][1]:,} documents read, every step adds up to {samples:,} samples"
    return Check("conservation", not wrong, "; ".join(wrong) or right)


def _sums(steps: Sequence[Sequence[Any]]) -> Iterator[tuple[str, int, int]]:
    """(step, what the steps before it leave, what it says)."""
    left = steps[0][1]
    for name, number, what in steps:
        if what == "left":
            yield name, left, number
        else:
            left -= number


def metadata(prepared: Prepared) -> Check:
    """metadata.json tells when the corpus was made, so no hash of it is part of the content; but every word of it
    follows from the manifest.
    """
    try:
        data = (prepared.path / METADATA).read_bytes()
        found = json.loads(data)
        same = data == publishing.spelled(found)
    except (OSError, ValueError, RecursionError) as error:
        return Check("metadata", False, f"{METADATA} is not readable ({type(error).__name__})")
    said = publishing.metadata(prepared.content, prepared.manifest["run"])
    same &= found == json.loads(canonical_json(said))
    what = "what the manifest does" if same else "something else than the manifest"
    return Check("metadata", same, f"{METADATA} says {what}")


def _sample(path: Path, shard: Mapping[str, Any], content: Mapping[str, Any], highest: int) -> Check:
    """The first row decoded, its mask in sight; with the highest id of all, where all were looked at."""
    try:
        tokenizer = load_file(path / "tokenizer.json", content["tokenizer"]["tokenizer_sha256"])
    except TokenizerError as error:
        return Check("sample", False, str(error))
    with pa.memory_map(str(path / shard["file"])) as file:
        first = next(iter(pa.ipc.open_stream(file)), None)
        row = first["input_ids"].slice(0, 1).flatten().to_pylist() if first is not None and first.num_rows else []
    size, mask = tokenizer.get_vocab_size(with_added_tokens=True), content["tokenizer"]["mask_id"]
    if max([highest, *row], default=-1) >= size:
        return Check("sample", False, f"an id is beyond the vocabulary of {size}")
    at = max(0, row.index(mask) - _SAMPLE_TOKENS // 2) if mask in row else 0
    return Check("sample", True, repr(tokenizer.decode(row[at : at + _SAMPLE_TOKENS], skip_special_tokens=False)))
