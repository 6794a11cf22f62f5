"""What the digests of a checkpoint cost: seconds of each save, and of them those in which its files are read back.

    python benchmarks/checkpoint.py [--hidden_size 1024] [--layers 12] [--saves 8] [--work build/benchmarks]

A real training on the CPU that saves after every step, by the clock and in seconds of this process on a CPU. The first
save is not counted; the least of each, since what else the machine does only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from moai.training import command, loop  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    given = parser.parse_args()
    work = given.work.resolve() / "checkpoint"
    work.mkdir(parents=True, exist_ok=True)
    saves: list[tuple[float, float]] = []
    digests: list[tuple[float, float]] = []
    loop.digests = timed(loop.digests, digests)
    loop.PackedTrainer._save_checkpoint = timed(loop.PackedTrainer._save_checkpoint, saves)
    try:
        if code := command.main(flags(given, work), os.environ):
            return code
        [saved] = (work / "out").glob("checkpoint-*")
        size = sum(path.stat().st_size for path in saved.iterdir()) / 1e9
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("| GB | | save without digests, s | digests, s | longer by |\n|---|---|---|---|---|")
    for clock, name in enumerate(("by the clock", "on a CPU")):
        rest = min(save[clock] - digest[clock] for save, digest in list(zip(saves, digests))[1:])
        least = min(digest[clock] for digest in digests[1:])
        print(f"| {size:.2f} | {name} | {rest:.2f} | {least:.3f} | {least / rest:.1%} |")
    return 0


def timed(function: Callable[..., Any], seconds: list[tuple[float, float]]) -> Callable[..., Any]:
    def call(*positional: Any, **named: Any) -> Any:
        began, used = time.perf_counter(), time.process_time()
        try:
            return function(*positional, **named)
        finally:
            seconds.append((time.perf_counter() - began, time.process_time() - used))

    return call


def flags(given: argparse.Namespace, work: Path) -> list[str]:
    model = json.loads((ROOT / "configs/model_config_demo.json").read_text()) | {
        "hidden_size": given.hidden_size,
        "intermediate_size": 4 * given.hidden_size,
        "num_hidden_layers": given.layers,
    }
    (work / "model.json").write_text(json.dumps(model))
    words = {
        "config": ROOT / "configs/demo.yaml",
        "dataset": ROOT / "data/demo/ko.jsonl.zst",
        "tokenizer_path": ROOT / "tokenizers/demo",
        "model_config": work / "model.json",
        "cache_dir": work / "cache",
        "output_dir": work / "out",
        "seq_len": 64,
        "batch_size": 1,
        "num_proc": 0,
        "gradient_accumulation_steps": 1,
        "max_steps": given.saves,
        "save_steps": 1,
        "save_total_limit": 1,
        "use_cpu": "true",
        "warmup_steps": 0,
    }
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


if __name__ == "__main__":
    sys.exit(main())
