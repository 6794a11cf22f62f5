"""The documents of a prepared directory in the format of another trainer.

    python -m moai export DIR --to megatron OUT        OUT.bin and OUT.idx, for Megatron-Core's --data-path OUT

Megatron packs by itself, so the pieces that `prepare` cut for its rows are joined again: a sequence is one document
with its EOS, and its BOS if the tokenizer has one, in the order of the sources. Each is a document in the index too.

OUT.bin is the tokens, one document behind the other. OUT.idx, all little-endian, is

    MMIDIDX 00 00, uint64 1, uint8 type of the tokens (4 int32, 8 uint16), uint64 sequences, uint64 sequences + 1
    int32 for each sequence how many tokens it has
    int64 for each sequence where it begins in OUT.bin, in bytes
    int64 the number of the sequence that each document begins with, and then the number of all sequences

One shard is in memory at a time: the manifest tells how many documents there are, and so where each table begins.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import ConfigError, DamagedError, StorageError
from moai.core.files import digest_file, sync
from moai.engine.schema import TRAINED
from moai.prepared.manifest import Prepared
from moai.transforms.pack import Pack, unpack

Lengths = npt.NDArray[np.int64]

_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}


def to_megatron(directory: Path, out: Path) -> Iterator[str]:
    """Write OUT.bin and OUT.idx; lines for people, of which the last is OUT.

    Raises ConfigError for conversations, StorageError where a file is in the way or cannot be written, DamagedError.
    """
    prepared = Prepared.open(directory)
    content = prepared.content
    if TRAINED in prepared.columns:
        raise ConfigError(
            f"{directory}: holds conversations, and Megatron's files have no place for which tokens are learned; "
            "export a prepared directory of text, or train on this one with train.py"
        )
    finals = [out.with_name(out.name + suffix) for suffix in (".bin", ".idx")]
    for final in finals:
        _refuse_existing(final)
    staged = [final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp") for final in finals]
    try:
        documents, tokens, dtype = _write(prepared, *staged)
        _publish(staged, finals)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        why = error.strerror or error
        raise StorageError(f"{out}: {why}; name a place that is there, is writable and has room") from error
    finally:
        for path in staged:
            path.unlink(missing_ok=True)
    if dropped := content["token_counts"].get("dropped", 0):
        yield (
            f"cut short    {dropped:,} tokens are absent: packing {content['packing']} dropped what documents have "
            f"over {content['seq_len']}; prepare with --packing bfd_split to export whole documents"
        )
    if left_out := ", ".join(column.name for column in prepared.beside):
        yield f"left out     the columns {left_out}, which the format has no place for"
    eos = content["tokenizer"]["eos_id"]
    yield f"exported     {documents:,} documents, {tokens:,} tokens of {dtype.name}, EOS is {eos}"
    yield str(out)


FORMATS: dict[str, Callable[[Path, Path], Iterator[str]]] = {"megatron": to_megatron}
"""What `--to` may name."""


def _write(prepared: Prepared, tokens_path: Path, index_path: Path) -> tuple[int, int, np.dtype[Any]]:
    """Both files, durable; how many documents and tokens, and the type of a token."""
    shards = [shard for shard in prepared.content["shards"] if shard["file"]]
    dtype = np.dtype("<u2" if prepared.columns[0].type == "uint16" else "<i4")
    number = sum(shard["documents"] for shard in shards)
    tables = np.cumsum([_HEADER.size, 4 * number, 8 * number]).tolist()
    documents = tokens = 0
    with open(tokens_path, "xb") as tokens_file, open(index_path, "xb") as index:
        index.write(_HEADER.pack(b"MMIDIDX\0\0", 1, _CODES[dtype], number, number + 1))
        _put(index, tables[2], np.zeros(1, "<i8"))
        for shard in shards:
            ids, lengths = _documents(prepared, shard)
            tokens_file.write(np.ascontiguousarray(ids, dtype).data)
            starts = (tokens + np.cumsum(lengths) - lengths) * dtype.itemsize
            _put(index, tables[0] + 4 * documents, lengths.astype("<i4"))
            _put(index, tables[1] + 8 * documents, starts.astype("<i8"))
            _put(index, tables[2] + 8 * (documents + 1), np.arange(1, len(lengths) + 1, dtype="<i8") + documents)
            documents, tokens = documents + len(lengths), tokens + len(ids)
        for file in (tokens_file, index):
            file.flush()
            os.fsync(file.fileno())
    return documents, tokens, dtype


def _put(file: BinaryIO, offset: int, values: npt.NDArray[Any]) -> None:
    file.seek(offset)
    file.write(values.data)


def _documents(prepared: Prepared, shard: Mapping[str, Any]) -> tuple[npt.NDArray[Any], Lengths]:
    """The tokens of a shard's documents as they were read, and how many each has."""
    content = prepared.content
    pack = Pack(
        seq_len=content["seq_len"],
        strategy=content["packing"],
        dtype=prepared.columns[0].type,
        split_long=content["config"]["long_documents"] == "split",
    )
    path, fates_path = (prepared.path / entry["file"] for entry in (shard, shard["documents_file"]))
    mend = f"mend it: python -m moai repair {prepared.path}"
    for file, entry in ((path, shard), (fates_path, shard["documents_file"])):
        if digest_file(file) != entry["xxh3_128"]:
            raise DamagedError(f"{file}: its bytes are not those the manifest names; {mend}")
    try:
        with pa.memory_map(str(fates_path)) as file:
            fates = pa.ipc.open_file(file).read_all()
            lengths = fates.filter(fates["reason"].is_null())["tokens"].to_numpy().astype(np.int64)
        with pa.memory_map(str(path)) as file:
            rows = pa.ipc.open_stream(file).read_all()
            ids, cut = (rows[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "seq_lengths"))
        return unpack(pack, lengths, ids, cut.astype(np.int64))
    except (DamagedError, pa.ArrowException) as error:
        raise DamagedError(f"{path}: {' '.join(str(error).split())[:200]}; {mend}") from error


def _publish(staged: list[Path], finals: list[Path]) -> None:
    """Give the files their names, the index last: without it nobody reads the tokens. Nothing is overwritten."""
    named: list[Path] = []
    try:
        for path, final in zip(staged, finals):
            _refuse_existing(final)
            try:
                os.link(path, final)
            except FileExistsError:
                _refuse_existing(final)
            except OSError:  # a file system without hard links
                os.rename(path, final)
            named.append(final)
    except BaseException:
        for final in named:
            final.unlink(missing_ok=True)
        raise
    sync(finals[0].parent)


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise StorageError(f"{final}: is there already, and export overwrites nothing; name another OUT, or remove it")
