"""From a prepared directory to batches: rows a second at random access, what opening costs, what memory epochs cost.
Linux only.

    python benchmarks/loader.py PREPARED_DIR [--rows 4096] [--shards 20 200 2000] [--epochs 10]

Access: batches of 8 and 32 random rows, in this process, through moai, through `datasets` (arrow and torch format) into
the same collator, and as `datasets` gives them (Python lists) into transformers' collator for language models;
interleaved, medians of --rounds. The first batch of all but the last must be equal. Opening: the shards, hard-linked
until there are --shards of them, out of the page cache, each time in a fresh process. "read" is what that process had
the disk read, until a second after opening; "cached" is the share of the shards that is in the page cache then.
Feeding: the same shards in the page cache, through the loader that train.py builds, beside rows that are views of the
table `load_from_disk` opens. Against the step: rows a second of order, rows and collator in the rank itself, and of
forward, backward and AdamW of the demo model on the same batches.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from moai.engine.schema import arrow_schema
from moai.prepared.manifest import Prepared, write_dataset_files, write_manifest
from moai.prepared.rows import PackedRows, Row
from moai.training.data import PackedCollator
from moai.training.loop import start_reader
from moai.training.model import build_model, load_config
from moai.training.order import Order, Sampler, sources_of

COLLATOR = PackedCollator(pad_id=0)
Load = Callable[[list[int]], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--rows", type=int, default=4096, help="rows read by each measurement of access")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="on a file system with a disk behind it"
    )
    given = parser.parse_args()
    access(given.prepared, given.rows, given.rounds)
    for count in given.shards:
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            many = many_shards(given.prepared, count, Path(folder) / "many")
            opening(many, given.rounds)
            feeding(many, given.rows, given.rounds)
    print_against_the_step(given.prepared, given.rows)
    measured = alone(epochs, given.prepared, given.epochs)
    first, last = measured[0], measured[-1]
    print(f"\n| memory, MB | of its own | mapped |\n|---|---|---|\n| after epoch 1 | {first[0]:.1f} | {first[1]:.1f} |")
    for number, (own, mapped) in enumerate(measured[1:], start=2):
        print(f"| after epoch {number} | {own:.1f} | {mapped:.1f} |")
    print(f"| growth | {last[0] - first[0]:.1f} | {last[1] - first[1]:.1f} |")
    return 0


# -- access


def access(path: Path, rows: int, rounds: int) -> None:
    ways = {
        "moai": moai_batches(path),
        "datasets, views of its table, moai's collator": table_batches(path),
        "datasets, arrow format, moai's collator": arrow_batches(path),
        "datasets, torch format, moai's collator": torch_batches(path),
        "datasets, Python lists, transformers' collator": list_batches(path),
    }
    prepared = Prepared.open(path)
    content = prepared.content
    megabytes = content["tokens"] / content["rows"] * np.dtype(prepared.columns[0].type).itemsize / 1e6
    order = np.random.default_rng(0).integers(0, content["rows"], rows).tolist()
    check_equal([load(order[:8]) for load in list(ways.values())[:4]])
    print(
        f"{content['rows']:,} rows of up to {content['seq_len']:,} {prepared.columns[0].type}, "
        f"{len(content['shards'])} shards\n"
    )
    print("| rows a batch | way | rows/s | MB/s of ids | ms a batch | time against moai's |\n|---|---|---|---|---|---|")
    for size in (8, 32):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, load in ways.items():
                started = time.perf_counter()
                for at in range(0, rows, size):
                    load(order[at : at + size])
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            ratio = f"{median / medians['moai']:.1f}"
            print(
                f"| {size} | {name} | {rows / median:,.0f} | {rows * megabytes / median:,.0f} | "
                f"{median * 1000 * size / rows:.3f} | {ratio} |",
                flush=True,
            )


def moai_batches(path: Path) -> Load:
    rows = PackedRows.of(Prepared.open(path))
    return lambda indices: COLLATOR(rows.__getitems__(indices))


class TableRows:
    """Each row a view of the table that `load_from_disk` opens: no copy before the collator's, as with PackedRows."""

    def __init__(self, path: Path) -> None:
        self.table = load_from_disk(path).data

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitems__(self, indices: list[int]) -> list[Row]:
        pieces = [self.table.fast_slice(index, 1) for index in indices]
        return [
            Row(*(piece.column(name).chunk(0).flatten().to_numpy() for name in ("input_ids", "seq_lengths")))
            for piece in pieces
        ]


def table_batches(path: Path) -> Load:
    rows = TableRows(path)
    return lambda indices: COLLATOR(rows.__getitems__(indices))


def arrow_batches(path: Path) -> Load:
    rows = load_from_disk(path).with_format("arrow")

    def load(indices: list[int]) -> dict[str, Any]:
        table = rows[indices]
        columns = [table[name].combine_chunks() for name in ("input_ids", "seq_lengths")]
        views = [np.split(column.values.to_numpy(), column.offsets.to_numpy()[1:-1]) for column in columns]
        return COLLATOR([Row(ids, pieces) for ids, pieces in zip(*views)])

    return load


def torch_batches(path: Path) -> Load:
    rows = load_from_disk(path).with_format("torch")
    return lambda indices: COLLATOR(
        [Row(row["input_ids"].numpy(), row["seq_lengths"].numpy()) for row in rows.__getitems__(indices)]
    )


def list_batches(path: Path) -> Load:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    eos = Prepared.open(path).content["tokenizer"]["eos_token"]
    collator = DataCollatorForLanguageModeling(
        PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), pad_token=eos), mlm=False
    )
    rows = load_from_disk(path).select_columns("input_ids")
    return lambda indices: collator(rows.__getitems__(indices))


def load_from_disk(path: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(path))


def check_equal(batches: list[dict[str, Any]]) -> None:
    import torch

    for batch in batches[1:]:
        if not all(torch.equal(batch[name], batches[0][name]) for name in batches[0]):
            sys.exit("the ways give different batches")


# -- opening


def many_shards(path: Path, count: int, target: Path) -> Path:
    """A prepared directory whose shards are those of another, over and over."""
    target.mkdir()
    prepared = Prepared.open(path)
    content = prepared.content
    shards, links = [shard for shard in content["shards"] if shard["file"]], []
    for number in range(count):
        shard = shards[number % len(shards)]
        name = f"data-{number:05d}-of-{count:05d}.arrow"
        if number < len(shards):
            shutil.copyfile(
                path / shard["file"], target / name
            )  # of their own: another process may hold the others in the cache
        else:
            os.link(target / links[number - len(shards)]["file"], target / name)
        links.append({**shard, "file": name})
    write_dataset_files(target, [link["file"] for link in links], arrow_schema(prepared.columns), "0" * 32)
    write_manifest(target, {**content, "shards": links, "files": [], "rows": sum(link["rows"] for link in links)}, {})
    return target


def opening(path: Path, rounds: int) -> None:
    ways = {"moai": open_moai, "datasets.load_from_disk": open_datasets}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(alone(measure_opening, way, path))
    shards, manifest = len(list(path.glob("data-*"))), (path / "manifest.json").stat().st_size
    print(f"\nOpening {shards:,} shards; the manifest has {manifest / 1e6:.1f} MB\n")
    print("| way | seconds | read, MB | cached, % | mappings | then the first row, ms |\n|---|---|---|---|---|---|")
    for name, times in found.items():
        seconds, read, cached, mapped, row = (statistics.median(values) for values in zip(*times))
        print(
            f"| {name} | {seconds:.3f} | {read / 1e6:.1f} | {cached * 100:.0f} | {mapped:,.0f} | {row * 1000:.2f} |",
            flush=True,
        )


def open_moai(path: Path) -> Any:
    return PackedRows.of(Prepared.open(path))


def open_datasets(path: Path) -> Any:
    return load_from_disk(path)


def measure_opening(way: Callable[[Path], Any], path: Path) -> tuple[float, ...]:
    """(seconds, bytes read from the disk, share of the shards in the page cache, mappings, seconds to the first row),
    in a fresh process.
    """
    import datasets  # noqa: F401  (not part of opening)

    files = {file.stat().st_ino: file for file in path.glob("data-*.arrow")}.values()
    for file in files:
        evict(file)
    before, started = bytes_read(), time.perf_counter()
    rows = way(path)
    seconds = time.perf_counter() - started
    time.sleep(1)  # what the kernel was asked to fetch meanwhile
    read, mapped = (
        bytes_read() - before,
        sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines()),
    )
    cached, pages = (sum(numbers) for numbers in zip(*map(resident, files)))
    started = time.perf_counter()
    rows[0]
    return seconds, read, cached / pages, mapped, time.perf_counter() - started


# -- feeding


def feeding(path: Path, rows: int, rounds: int) -> None:
    ways: dict[str, Callable[[Path], Any]] = {
        "moai": open_moai,
        "datasets.load_from_disk, views of its table": TableRows,
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(alone(measure_feeding, way, path, rows))
    print(
        "\n| feeding training | opening to first batch, s | rows/s in the rank | rows/s from one reader | wait, % of a "
        "step | MB of its own |"
    )
    print("|---|---|---|---|---|---|")
    for name, times in found.items():
        first, alone_, reader, wait, own = (statistics.median(values) for values in zip(*times))
        print(f"| {name} | {first:.3f} | {alone_:,.0f} | {reader:,.0f} | {wait * 100:.2f} | {own:.0f} |", flush=True)


def measure_feeding(way: Callable[[Path], Any], path: Path, rows: int, *, size: int = 8) -> tuple[float, ...]:
    """(seconds from opening to the first batch, rows/s of the rank itself, rows/s of one reader, share of a step spent
    waiting, MB added) in batches of 8.
    """
    import datasets  # noqa: F401  (not part of opening)
    import torch.utils.data  # noqa: F401
    import transformers.trainer_utils  # noqa: F401

    before, started = memory_of_process()[0], time.perf_counter()
    opened = way(path)
    next(training_batches(opened, path, size, readers=0))
    first, own = time.perf_counter() - started, memory_of_process()[0] - before
    rates = []
    for readers in (0, 1):
        batches = training_batches(opened, path, size, readers=readers)
        next(batches)
        started = time.perf_counter()
        taken = sum(len(batch["input_ids"]) for batch in islice(batches, rows // size))
        rates.append(taken / (time.perf_counter() - started))
    waits, steps = step_seconds(path, training_batches(opened, path, size, readers=0))
    return first, *rates, sum(waits) / (sum(waits) + sum(steps)), own


def training_batches(opened: Any, path: Path, size: int, *, readers: int) -> Iterator[dict[str, Any]]:
    """Of the loader that train.py builds: its order, its collator, its readers (moai.training.machine,
    moai.training.loop).
    """
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import seed_worker

    sampler: Any = Sampler(Order(sources_of(Prepared.open(path).content["shards"]), 42))
    start = partial(start_reader, then=partial(seed_worker, num_workers=readers, rank=0)) if readers else None
    return iter(
        DataLoader(
            opened,
            size,
            sampler=sampler,
            collate_fn=COLLATOR,
            drop_last=True,
            num_workers=readers,
            multiprocessing_context="fork" if readers else None,  # a process that was spawned would spawn too
            prefetch_factor=4 if readers else None,
            persistent_workers=readers > 0,
            worker_init_fn=start,
        )
    )


def evict(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    return int(
        next(
            line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")
        )
    )


def resident(path: Path) -> tuple[int, int]:
    """(pages in the page cache, pages)."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    seen = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in seen), len(seen)


# -- against the step


def print_against_the_step(path: Path, rows: int, *, size: int = 8) -> None:
    """How many times as fast as the demo model takes rows they come, without any process of their own."""
    supply, demand, device = rows_per_second(path, rows, size), step_rows_per_second(path, size), device_name()
    print(
        f"\n| against the step, {size} rows a batch | rows/s |\n|---|---|\n| order, rows and collator | {supply:,.0f} |"
    )
    print(f"| a step of the demo model, {device} | {demand:,.1f} |\n| times | {supply / demand:,.0f} |", flush=True)


def rows_per_second(path: Path, rows: int, size: int) -> float:
    """In the order in which training takes them."""
    load, sampler = moai_batches(path), iter(Sampler(Order(sources_of(Prepared.open(path).content["shards"]), 42)))
    load(list(islice(sampler, size)))
    started = time.perf_counter()
    for _ in range(0, rows, size):
        load(list(islice(sampler, size)))
    return rows / (time.perf_counter() - started)


def step_rows_per_second(path: Path, size: int) -> float:
    return size / statistics.median(step_seconds(path, training_batches(open_moai(path), path, size, readers=0))[1])


def step_seconds(path: Path, batches: Iterator[dict[str, Any]], *, steps: int = 5) -> tuple[list[float], list[float]]:
    """(seconds waited for a batch, seconds of the step) of `steps` steps of the demo model."""
    import torch

    content, device = Prepared.open(path).content, device_name()
    config = load_config(str(Path(__file__).parent.parent / "configs" / "model_config_demo.json"), None)
    config.vocab_size, config.max_position_embeddings = (
        max(config.vocab_size, content["vocab_size"]),
        content["seq_len"],
    )
    model = build_model(config, pretrained_model=None, attention="sdpa", special_ids={}, seed=0, device=device).train()
    optimizer, waits, seconds = torch.optim.AdamW(model.parameters()), [], []
    for _ in range(2 + steps):
        asked = time.perf_counter()
        batch = next(batches)
        started = time.perf_counter()
        model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.accelerator.synchronize()
        waits.append(started - asked)
        seconds.append(time.perf_counter() - started)
    return waits[2:], seconds[2:]


def device_name() -> str:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


# -- memory


def epochs(path: Path, count: int) -> list[tuple[float, float]]:
    """Megabytes of this process, (its own, mapped), after each epoch of random batches."""
    load, rows = moai_batches(path), Prepared.open(path).content["rows"]
    found = []
    for epoch in range(count):
        order = np.random.default_rng(epoch).permutation(rows).tolist()
        for at in range(0, rows, 32):
            load(order[at : at + 32])
        found.append(memory_of_process())
    return found


def memory_of_process() -> tuple[float, float]:
    """Megabytes (its own, mapped)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1000, int(status["RssFile"].split()[0]) / 1000


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
