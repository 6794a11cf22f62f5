"""How many tokens a pipeline really wrote, and the sum of their ids, read from its files.

Equal counts and equal sums, whatever the order of the documents, say that two pipelines did the same work. Padding is
in neither.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from peers.indexed import read_dtype


def arrow_rows(folder: Path) -> tuple[int, int]:
    """Rows of `datasets`: `input_ids`, of which the first `sum(seq_lengths)` are tokens where there is such a
    column.
    """
    tokens = total = 0
    for path in sorted(folder.glob("*.arrow")):
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            ids = batch["input_ids"].flatten().to_numpy()
            if "seq_lengths" in batch.schema.names:
                ids = ids[
                    _position_in_row(batch["input_ids"])
                    < _held(batch["seq_lengths"])[pc.list_parent_indices(batch["input_ids"])]
                ]
            tokens += len(ids)
            total += int(ids.sum(dtype=np.uint64))
    return tokens, total


def _position_in_row(rows: pa.Array) -> np.ndarray:
    lengths = pc.list_value_length(rows).to_numpy()
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _held(lengths: pa.Array) -> np.ndarray:
    """The sum of each row of lengths."""
    return np.bincount(pc.list_parent_indices(lengths), weights=lengths.flatten(), minlength=len(lengths))


def indexed(folder: Path) -> tuple[int, int]:
    return _raw(folder / "text.bin", read_dtype(folder / "text.idx"))


def token_files(folder: Path) -> tuple[int, int]:
    """datatrove: the last number of an index, the end of the last document, is the count of its file."""
    counted = []
    for path in sorted(folder.glob("*.ds")):
        tokens = int(np.fromfile(f"{path}.index", np.uint64)[-1])
        counted.append(_raw(path, np.dtype(f"u{path.stat().st_size // tokens}")))
    return sum(tokens for tokens, _ in counted), sum(total for _, total in counted)


def litdata_chunks(folder: Path) -> tuple[int, int]:
    """Each chunk: the number of documents, their byte offsets and one more, all uint32, then the ids."""
    found = json.loads((folder / "index.json").read_bytes())
    assert found["config"]["data_format"] in (["no_header_tensor:15"], ["no_header_tensor:16"]), found["config"][
        "data_format"
    ]  # torch.int32
    counted = [
        _raw(folder / chunk["filename"], np.dtype(np.int32), skip=(chunk["chunk_size"] + 2) * 4)
        for chunk in found["chunks"]
    ]
    return sum(tokens for tokens, _ in counted), sum(total for _, total in counted)


def _raw(path: Path, dtype: np.dtype, skip: int = 0) -> tuple[int, int]:
    ids = np.memmap(path, dtype, "r", skip)
    return len(ids), int(ids.sum(dtype=np.uint64))
