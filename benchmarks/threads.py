"""Processes or threads: the same pipeline with its shards worked on by processes, and by as many threads of one
process.

    python benchmarks/threads.py FILES... --tokenizer_path DIR [--megabytes 400] [--rounds 3] [--num_proc 2]

Interleaved rounds, medians. The clock runs from `prepare` to its end in a process that is up already; a fresh cache
each time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import repeat

from moai.engine.executor import Finished, Order
from moai.engine.pipeline import Pipeline, run_shard
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import prepare


@dataclass(frozen=True)
class Threads:
    num_proc: int

    def start(self) -> None: ...

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def map(
        self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]
    ) -> Iterator[Finished]:
        lock = threading.Lock()

        def say(number: int) -> None:
            with lock:
                on_documents(number)

        with ThreadPoolExecutor(self.num_proc) as pool:
            for order, (receipt, reused) in pool.map(
                lambda order: (order, run_shard(pipelines[order[0]], order[1], say)), orders
            ):
                yield order, receipt, reused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_proc", type=int, default=2)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"processes": [], "threads": []}
    with tempfile.TemporaryDirectory() as folder:
        data = repeat(given.files, given.megabytes, Path(folder) / "data.jsonl")
        for number in range(given.rounds):
            for kind in seconds:
                config = DataConfig(
                    dataset=(str(data),),
                    tokenizer_path=given.tokenizer_path,
                    packing="wrapped",
                    num_proc=given.num_proc,
                    cache_dir=f"{folder}/{kind}-{number}",
                )
                started = time.perf_counter()
                prepare(config, executor=None if kind == "processes" else Threads(given.num_proc))
                seconds[kind].append(time.perf_counter() - started)
    print("| workers are | seconds | MB/s |\n|---|---|---|")
    for kind, all_ in seconds.items():
        print(
            f"| {given.num_proc} {kind} | {statistics.median(all_):.2f} ({min(all_):.2f} to {max(all_):.2f}) | "
            f"{given.megabytes / statistics.median(all_):.0f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
