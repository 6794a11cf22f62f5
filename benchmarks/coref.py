"""The entity-coref corpus against bare Kiwi on the same documents and cores, and against the guides' own loop:
interleaved rounds, medians, ratios.

    python benchmarks/coref.py FILES... --model DIR [--documents 8000] [--rounds 3] [--workers 2] [--without-guides]
    [--no-pronoun-filter] [--min-nnp-ratio X] [--max-nnp-ratio X] python benchmarks/coref.py FILES... --model DIR
    --memory [--documents 2000]

FILES (JSON lines with `text`, plain or .zst) are repeated until --documents of them have survived the cheap rules,
those that have not in between. `kiwi` gets the survivors alone, loaded once and forked; `guides` and moai get
everything. Each run is a process of its own and its clock runs from start to end, loading included; moai begins with an
empty cache. "survivors/s" divides the documents that pass the cheap rules by that time for all three.

The guides' chunks of 2,000 texts keep W workers busy to the end only if the survivors fill a multiple of W of them:
8,000 for two.

--memory: the parent's peak over inputs of --documents and of ten times as many, and what a worker has for itself: doing
all of it, where every document is dropped right after Kiwi, and where every one is dropped right before. The difference
of the last two is Kiwi's. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
import zstandard
from measure import Measured, measure

from moai.coref.korean import CheapRules
from moai.coref.manifest import read_manifest

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunksize", type=int, default=2000)
    parser.add_argument(
        "--shard-bytes",
        default="250KB",
        help="moai's unit of work: small here, so that its last ones end together as the chunks of the others do",
    )
    parser.add_argument("--rules", default="v2", help="of moai: v2 as the guides' loop, or mention")
    parser.add_argument("--max-entity-freq", type=int, default=1000)
    parser.add_argument("--min-nnp-ratio", type=float, default=0.05)
    parser.add_argument("--max-nnp-ratio", type=float, default=0.20)
    parser.add_argument("--no-pronoun-filter", action="store_true")
    parser.add_argument("--without-guides", action="store_true", help="leave out what takes the longest")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (memory if given.memory else race)(given, Path(folder))
    return 0


def race(given: argparse.Namespace, work: Path) -> None:
    everything, survivors = work / "all.jsonl", work / "survivors.jsonl"
    number = write(given, given.documents, everything, survivors)
    pronouns = "0" if given.no_pronoun_filter else "1"
    guides = [
        str(given.workers),
        str(given.chunksize),
        str(given.min_nnp_ratio),
        str(given.max_nnp_ratio),
        pronouns,
        str(given.max_entity_freq),
    ]
    commands = {
        "kiwi": [sys.executable, str(PEERS / "coref_kiwi.py"), str(survivors), str(given.workers)],
        "guides": [sys.executable, str(PEERS / "coref_guides.py"), str(everything), *guides],
        "moai": moai(given, everything, work / "out"),
    }
    if given.without_guides:
        del commands["guides"]
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    content: dict[str, object] = {}
    for _ in range(given.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command))
            if name == "moai":
                content = read_manifest(Path(runs[name][-1].output.splitlines()[-1]))["content"]
                subprocess.run(["rm", "-rf", str(work / "out")], check=True)
    funnel = {step: count for step, count, _ in content["funnel"]}  # type: ignore[attr-defined]
    nnp = funnel["passed the cheap rules"] - funnel["5 nnp"]  # what the guides analyse twice
    rate = nnp / number
    print(
        f"{funnel['read']:,} documents, {number:,} survive the cheap rules, {rate:.1%} of these pass the share of "
        f"proper nouns, {funnel['passed']:,} pass all; ",
        end="",
    )
    print(f"{content['rows']:,} samples; {given.workers} workers, {given.rounds} rounds\n")
    print("| pipeline | s, median (each) | CPU s | survivors/s | peak MB | moai is |\n|---|---|---|---|---|---|")
    seconds = {name: median(one.seconds for one in found) for name, found in runs.items()}
    for name, found in runs.items():
        each = ", ".join(f"{one.seconds:.1f}" for one in found)
        cpu, peak = median(one.cpu_seconds for one in found), max(one.peak_bytes for one in found) / 1e6
        print(
            f"| {name} | {seconds[name]:.1f} ({each}) | {cpu:.1f} | {number / seconds[name]:.1f} | {peak:,.0f} | "
            f"{seconds[name] / seconds['moai']:.3f} x |"
        )
    print(f"\nwanted: at least 0.950 x kiwi, and at least 0.95 x (1 + {rate:.3f}) = {0.95 * (1 + rate):.3f} x guides")


def memory(given: argparse.Namespace, work: Path) -> None:
    print("| documents that survive | worked on | parent, peak MB | a worker's own, peak MB |\n|---|---|---|---|")
    ways = {
        "all of it": (),
        "up to Kiwi": ("--min-nnp-ratio", "1", "--max-nnp-ratio", "1"),
        "before Kiwi": ("--min-sentences", "1000000"),
    }
    for documents, what in ((given.documents, "all of it"), *((10 * given.documents, what) for what in ways)):
        flags = ways[what]
        everything = work / "all.jsonl"
        number = write(given, documents, everything, work / "survivors.jsonl")
        process = subprocess.Popen(
            [*moai(given, everything, work / "out"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        parent, worker = watch(process)
        subprocess.run(["rm", "-rf", str(work / "out")], check=True)
        print(f"| {number:,} | {what} | {parent / 1e6:.1f} | {worker / 1e6:.1f} |", flush=True)


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """(peak of the parent, peak of any one worker), unshared bytes, looked at ten times a second. A worker is a child
    of the process that forks them.
    """
    parent = worker = 0
    here = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            parent = max(parent, here.memory_full_info().uss)
            for child in here.children():
                worker = max([worker, *(each.memory_full_info().uss for each in child.children())])
        time.sleep(0.1)
    return parent, worker


def moai(given: argparse.Namespace, data: Path, output: Path) -> list[str]:
    bounds = ["--min-nnp-ratio", given.min_nnp_ratio, "--max-nnp-ratio", given.max_nnp_ratio]
    flags = [
        "--rules",
        given.rules,
        *(bounds if given.rules == "v2" else ()),
        "--max-entity-freq",
        given.max_entity_freq,
        "--shard-bytes",
        given.shard_bytes,
        "--num-workers",
        given.workers,
    ]
    flags += ["--no-pronoun-filter"] if given.no_pronoun_filter else []
    return [
        sys.executable,
        "-m",
        "moai",
        "entity-coref",
        "--input",
        str(data),
        "--model",
        given.model,
        "--output-dir",
        str(output),
        *map(str, flags),
    ]


def write(given: argparse.Namespace, documents: int, everything: Path, survivors: Path) -> int:
    """Repeat the texts until `documents` have survived; a number before each keeps copies from being equal. Returns how
    many survived.
    """
    rules, number = CheapRules() if given.rules == "v2" else CheapRules(min_length=300, max_length=20_000), 0
    texts = [(text, not rules.failed_by(text)) for text in read(given.files)]
    assert any(survives for _, survives in texts), "no document survives the cheap rules"
    with open(everything, "w", encoding="utf-8") as all_, open(survivors, "w", encoding="utf-8") as some:
        for copy in itertools.count():
            for place, (text, survives) in enumerate(texts):
                line = json.dumps({"id": f"{copy}-{place}", "text": text}, ensure_ascii=False) + "\n"
                all_.write(line)
                if survives:
                    some.write(line)
                    number += 1
                    if number == documents:
                        return number
    raise AssertionError


def read(files: list[Path]) -> Iterator[str]:
    for path in files:
        with contextlib.ExitStack() as opened:
            raw = opened.enter_context(open(path, "rb"))
            stream = (
                opened.enter_context(zstandard.ZstdDecompressor().stream_reader(raw)) if path.suffix == ".zst" else raw
            )
            yield from (json.loads(line)["text"] for line in io.TextIOWrapper(stream, "utf-8"))


if __name__ == "__main__":
    os.chdir(ROOT)  # for `python -m moai`; name files from there or in full
    sys.exit(main())
