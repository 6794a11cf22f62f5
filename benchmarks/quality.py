"""How fast documents are measured and judged: moai compiled, moai in plain Python, and datatrove's filters.

    .venv/bin/python benchmarks/quality.py --data ../shared/data [--datatrove DIR] [--documents 1500] [--rounds 3]

One process, CPU seconds, the ways taking turns. datatrove is asked for GopherRepetitionFilter, GopherQualityFilter and
FineWebQualityFilter on moai's words, so that its decisions can be compared; DIR is where `pip install --target DIR
datatrove` put it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import zstandard

from moai.quality import plain, scan
from moai.quality.rules import PROFILES, failures

ONE_IN = 10
"""Of the documents only so many are given to the slow ways."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with en.jsonl.zst, ko.jsonl.zst, code.jsonl.zst"
    )
    parser.add_argument("--datatrove", type=Path, help="a folder with datatrove and what it needs")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    filters = datatrove(given.datatrove) if given.datatrove else {}
    print("| text | way | MB/s | documents |\n|---|---|---:|---:|")
    for name in ("en", "ko", "code"):
        lines = zstandard.open(given.data / f"{name}.jsonl.zst", "rb").read().splitlines()[: given.documents]
        texts = [text for line in lines if (text := json.loads(line)["text"]).strip()]
        ways: dict[str, tuple[list[str], Callable[[list[str]], Any]]] = {
            "moai (numba), measured and judged": (texts, judged),
            "moai in plain Python, measured": (texts[::ONE_IN], lambda some: [plain.statistics(text) for text in some]),
        }
        if filters:
            ways["datatrove, three filters"] = (texts[::ONE_IN], partial(filtered, filters))
        judged(texts[:2])
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.rounds):
            for way, (some, run) in ways.items():
                began = time.process_time()
                run(some)
                seconds[way].append(time.process_time() - began)
        for way, (some, _) in ways.items():
            megabytes = sum(len(text.encode()) for text in some) / 1e6
            print(f"| {name} | {way} | {megabytes / median(seconds[way]):.2f} | {len(some):,} |", flush=True)
        if filters:
            print(f"| {name} | {equal(filters, texts)} | | |", flush=True)


def judged(texts: list[str]) -> Any:
    found = scan.statistics(pa.array(texts, pa.large_string()))
    return failures({name: found[:, at] for at, name in enumerate(plain.NAMES)}, PROFILES["fineweb"])


def datatrove(folder: Path) -> dict[str, Any]:
    """Its own filters by the beginning of our rules' names, on moai's words."""
    sys.path.append(str(folder))
    from datatrove.pipeline.filters import fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter

    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, _: plain.words_of(text)
    return {
        "gopher.": gopher_quality_filter.GopherQualityFilter(),
        "repetition.": gopher_repetition_filter.GopherRepetitionFilter(),
        "fineweb.": fineweb_quality_filter.FineWebQualityFilter(),
    }


def filtered(filters: dict[str, Any], texts: list[str]) -> dict[str, list[bool]]:
    """Which texts each of them drops."""
    from datatrove.data import Document

    return {
        name: [one.filter(Document(text=text, id="")) is not True for text in texts] for name, one in filters.items()
    }


def equal(filters: dict[str, Any], texts: list[str]) -> str:
    found = scan.statistics(pa.array(texts, pa.large_string()))
    numbers = {name: found[:, at] for at, name in enumerate(plain.NAMES)}
    same = 0
    for prefix, theirs in filtered(filters, texts).items():
        rules = {rule: at for rule, at in PROFILES["fineweb"].items() if rule.startswith(prefix)}
        same += int(((failures(numbers, rules) > 0) == theirs).sum())
    return f"{same:,} of {len(filters) * len(texts):,} decisions equal"


if __name__ == "__main__":
    main()
