"""Best-fit packing of a million documents: seconds, rows, fill rate and tokens lost, beside TRL's `pack_dataset`.

    python benchmarks/pack.py --work DIR [--documents 1000000] [--seq_len 2048] [--rounds 3] [--memory_gb 14]

Both read the same Arrow file (large_list<uint16>, 2,500 documents a record batch) through the page cache and write
their rows to an Arrow file; the clock runs from the open input to the closed output, without imports. Every measurement
is a process of its own; interleaved, medians. "at a time" is how many documents are packed together: 2,500 is about a
shard of moai's pipeline, 1,000 is what `pack_dataset` takes unless told otherwise. The lengths are log-normal, fitted
to the 16,747 documents of RESULTS.md under tokenizers/demo (the logarithm has mean 6.98 and deviation 1.118: 1,075
tokens in the middle, 2,011 on average), and the ids are random, all from a fixed seed. Read back and compared with the
input are the number of tokens and how often each id occurs. TRL comes from requirements-trl.txt into DIR/.venv-trl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).parent
LOG_MEAN, LOG_DEVIATION = 6.98, 1.118
SHARD = 2500
ALL = 0
WAYS = [
    ("moai", SHARD),
    ("trl", SHARD),
    ("trl", 1000),
    ("moai", 20 * SHARD),
    ("trl", 20 * SHARD),
    ("moai", ALL),
    ("trl", ALL),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--strategies", nargs="+", default=["bfd_split", "bfd"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory_gb", type=int, default=14)
    parser.add_argument("--work", type=Path, required=True, help="needs 10 GB for a million documents")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    pythons = {"moai": Path(sys.executable), "trl": trl_python(given.work / ".venv-trl")}
    documents, packed = given.work / "documents.arrow", given.work / "packed" / "rows.arrow"
    lengths = write_documents(documents, given.documents)
    occurrences, wrong = count_ids(documents), 0
    print(f"{given.documents:,} documents, {lengths.sum():,} tokens, seq_len {given.seq_len:,}\n")
    print(
        "| strategy | at a time | who | seconds | CPU seconds | M tokens/s | rows | fill rate, % | tokens lost | ids "
        "|\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for strategy in given.strategies:
        over = int(np.maximum(lengths - given.seq_len, 0).sum()) if strategy == "bfd" else 0
        seconds: dict[tuple[str, int], list[list[float]]] = {way: [] for way in WAYS}
        said: dict[tuple[str, int], str] = {}
        for number in range(given.rounds):
            for who, group in list(seconds):
                command = [
                    pythons[who],
                    __file__,
                    "--alone",
                    who,
                    documents,
                    packed,
                    strategy,
                    group or given.documents,
                    given.seq_len,
                    given.memory_gb,
                ]
                packed.parent.mkdir()
                os.sync()  # what others have written must not be written during this
                ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
                print(
                    f"round {number + 1}, {strategy}, {group or 'all'}, {who}: {ended.stdout.strip()}",
                    file=sys.stderr,
                    flush=True,
                )
                if ended.returncode and "MemoryError" not in ended.stderr:
                    sys.exit(f"{who} failed with {ended.returncode}\n{ended.stderr}")
                if ended.returncode:
                    del seconds[who, group]
                else:
                    seconds[who, group].append(json.loads(ended.stdout.splitlines()[-1]))
                    if number == 0:
                        rows, tokens = count_rows(packed, given.seq_len)
                        lost = int(lengths.sum()) - tokens
                        wrong += lost != over
                        ids = (
                            "same"
                            if np.array_equal(count_ids(packed), occurrences)
                            else "fewer"
                            if lost
                            else "DIFFERENT"
                        )
                        said[who, group] = f"{rows:,} | {100 * tokens / rows / given.seq_len:.3f} | {lost:,} | {ids}"
                shutil.rmtree(packed.parent)  # with what a failed one left behind
        for who, group in WAYS:
            print(f"| {strategy} | {f'{group:,}' if group else 'all'} | {who} | ", end="")
            if times := seconds.get((who, group)):
                wall, cpu = (statistics.median(values) for values in zip(*times))
                print(f"{wall:.2f} | {cpu:.2f} | {lengths.sum() / wall / 1e6:,.0f} | {said[who, group]} |", flush=True)
            else:
                print(f"more than {given.memory_gb} GB | | | | | | |", flush=True)
    documents.unlink()
    return 1 if wrong else 0


def trl_python(folder: Path) -> Path:
    """The interpreter of TRL's environment, made anew when the requirements are others than it was made from."""
    requirements, installed = HERE / "requirements-trl.txt", folder / "installed.txt"
    python = folder / "bin" / "python"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing TRL into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True, stdout=sys.stderr
        )
        shutil.copy(requirements, installed)
    return python


# -- input and output


def write_documents(path: Path, count: int) -> np.ndarray:
    """Random documents; returns their lengths."""
    generator = np.random.default_rng(0)
    lengths = np.maximum(1, generator.lognormal(LOG_MEAN, LOG_DEVIATION, count)).astype(np.int64)
    schema = pa.schema([("input_ids", pa.large_list(pa.uint16()))])
    with pa.ipc.new_stream(str(path), schema) as writer:
        for start in range(0, count, SHARD):
            offsets = np.concatenate(([0], np.cumsum(lengths[start : start + SHARD])))
            ids = generator.integers(0, 1 << 16, offsets[-1], np.uint16)
            writer.write_batch(pa.record_batch([pa.LargeListArray.from_arrays(offsets, ids)], schema=schema))
    return lengths


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def count_rows(path: Path, seq_len: int) -> tuple[int, int]:
    """(rows, tokens). Ends the benchmark at a row that is empty, over seq_len, or contradicts its seq_lengths."""
    rows = tokens = 0
    for batch in batches_of(path):
        ids, pieces = batch["input_ids"], batch["seq_lengths"]
        lengths = np.diff(ids.offsets.to_numpy())
        sums = np.add.reduceat(pieces.values.to_numpy().astype(np.int64), pieces.offsets.to_numpy()[:-1])
        if not (np.array_equal(sums, lengths) and lengths.min() > 0 and lengths.max() <= seq_len):
            sys.exit(f"{path}: rows that cannot be trained on")
        rows, tokens = rows + len(lengths), tokens + int(lengths.sum())
    return rows, tokens


def count_ids(path: Path) -> np.ndarray:
    """How often each id occurs."""
    total = np.zeros(1 << 16, np.int64)
    for batch in batches_of(path):
        ids = batch["input_ids"].flatten().to_numpy()
        for start in range(0, len(ids), 1 << 24):
            total += np.bincount(ids[start : start + (1 << 24)], minlength=1 << 16)
    return total


# -- what is measured, each in a process of its own


def pack_by_moai(documents: Path, packed: Path, strategy: str, group: int, seq_len: int) -> None:
    """Each group of whole record batches through the transform that the pipeline uses."""
    from moai.engine import pipeline
    from moai.transforms.pack import Pack

    pack = Pack(seq_len=seq_len, strategy=strategy, dtype="uint16")
    pipeline._tally.set(pipeline.Tally())
    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("seq_lengths", pa.list_(pa.uint32()))])
    shards = (pa.record_batch([batch["input_ids"]], names=["tokens"]) for batch in batches_of(documents))
    groups = iter(lambda: list(islice(shards, max(1, group // SHARD))), [])
    with pa.ipc.new_stream(str(packed), schema) as writer:
        for batches in groups:
            for rows in pack(iter(batches)):
                writer.write_batch(pa.record_batch(rows.columns, schema=schema))


def pack_by_trl(documents: Path, packed: Path, strategy: str, group: int, seq_len: int) -> None:
    import datasets
    from trl import pack_dataset

    rows = datasets.Dataset.from_file(str(documents))
    pack_dataset(
        rows,
        seq_len,
        strategy=strategy,
        map_kwargs={"batch_size": group, "cache_file_name": str(packed), "load_from_cache_file": False},
    )


def alone(who: str, documents: str, packed: str, strategy: str, group: str, seq_len: str, memory_gb: str) -> None:
    """Print [seconds, CPU seconds]."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb) * 10**9,) * 2)
    functions: dict[str, Callable[..., Any]] = {"moai": pack_by_moai, "trl": pack_by_trl}
    if who == "trl":
        import datasets
        import trl  # noqa: F401
        from trl import pack_dataset  # noqa: F401  (loads what it needs)

        datasets.disable_progress_bars()
    else:
        import moai.transforms.pack  # noqa: F401
    wall, cpu = time.perf_counter(), time.process_time()
    functions[who](Path(documents), Path(packed), strategy, int(group), int(seq_len))
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
        sys.exit()
    sys.exit(main())
