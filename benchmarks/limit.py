"""What this machine could do at best with the same work, and moai's share of it.

    python benchmarks/limit.py FILES... --tokenizer_path DIR [--megabytes 400 1600] [--rounds 3] [--num_proc 2]
    [--packing wrapped bfd_split]

The limit is one process a worker, each pinned to a core, that reads its part of the file, parses every line with orjson
and tokenizes the texts with fastokens: nothing is checked, packed or written, and loading and forking are outside its
clock (moai.bench.limit holds it, for `python -m moai bench`). moai is the whole command, from its start to its end.
FILES (JSON lines with `text`) are repeated to each size and read once before every run. Interleaved rounds, medians;
the share is a rate over the limit's. "after the first" takes both rates from what the largest size costs more than the
smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from corpus import repeat
from measure import CommandFailed, Measured, measure
from prepare import ENVIRONMENT, moai_command

LIMIT = "limit"
PART_BYTES = 16_000_000
"""What a process of the limit takes at a time: a shard's worth."""


@dataclass(frozen=True)
class Run:
    """Seconds, of the limit only those on its clock; CPU seconds and peak bytes of the whole tree."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    tokens: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[400, 1600])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--packing", nargs="+", default=["wrapped", "bfd_split"])
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--limit_seconds", type=float, default=1800, help="of one run")
    parser.add_argument(
        "--alone", action="store_true", help="only measure the limit, on the one file given, and print it as JSON"
    )
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(limit(given.files[0], given.tokenizer_path, given.num_proc)))
        return 0
    given.tokenizer_path, given.work = given.tokenizer_path.resolve(), (given.work / "limit").resolve()
    try:
        print(table(run_all(given), given))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    return 0


def limit(path: Path, tokenizer: Path, processes: int) -> dict[str, float]:
    """Bytes a second of all processes together, and how many ids there were."""
    from moai.bench.limit import Bare, ceiling
    from moai.bench.report import bytes_per_second
    from moai.tokenizers.backends import make
    from moai.tokenizers.load import load_tokenizer

    backend, size = make("fastokens", load_tokenizer(str(tokenizer)), split_special_tokens=False), path.stat().st_size
    starts = range(0, size, PART_BYTES)
    parts = [
        (Bare(backend, "text", ((str(path), start, min(start + PART_BYTES, size)),)), min(PART_BYTES, size - start))
        for start in starts
    ]
    done = ceiling(backend, parts, processes=processes)
    return {
        "bytes_per_second": bytes_per_second(done),
        "bytes": size,
        "tokens": sum(stretch.tokens for stretch in done),
    }


def run_all(given: argparse.Namespace) -> dict[tuple[int, str], list[Run]]:
    """Runs by size and pipeline. One unmeasured round on 1 MB comes first."""
    pipelines = [LIMIT, *given.packing]
    results: dict[tuple[int, str], list[Run]] = {}
    data = given.work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for megabytes, rounds in [(1, 1), *((size, given.rounds) for size in given.megabytes)]:
        repeat(given.files, megabytes, data / "data.jsonl")
        for number in range(rounds):
            for pipeline in pipelines:
                result = run(pipeline, data, given)
                print(
                    f"{megabytes} MB, round {number + 1}: {pipeline} {result.seconds:.2f} s, {result.cpu_seconds:.2f} "
                    f"CPU s",
                    file=sys.stderr,
                    flush=True,
                )
                results.setdefault((megabytes, pipeline), []).append(result)
    return {key: runs for key, runs in results.items() if key[0] in given.megabytes}


def run(pipeline: str, data: Path, given: argparse.Namespace) -> Run:
    out = given.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (data / "data.jsonl").read_bytes()
    os.sync()
    alone = [
        sys.executable,
        __file__,
        data / "data.jsonl",
        "--tokenizer_path",
        given.tokenizer_path,
        "--num_proc",
        given.num_proc,
        "--alone",
    ]
    command = alone if pipeline == LIMIT else moai_command(pipeline, data, out, given)
    environment = {name: value.format(out=out) for name, value in ENVIRONMENT.items()}
    measured = measure([str(word) for word in command], environment=environment, limit_seconds=given.limit_seconds)
    try:
        return of_limit(measured) if pipeline == LIMIT else of_moai(measured)
    finally:
        shutil.rmtree(out)


def of_limit(measured: Measured) -> Run:
    said = json.loads(measured.output)
    return Run(said["bytes"] / said["bytes_per_second"], measured.cpu_seconds, measured.peak_bytes, said["tokens"])


def of_moai(measured: Measured) -> Run:
    content = json.loads((Path(measured.output.splitlines()[-1]) / "manifest.json").read_bytes())["content"]
    return Run(measured.seconds, measured.cpu_seconds, measured.peak_bytes, content["token_counts"]["text"])


def table(results: dict[tuple[int, str], list[Run]], given: argparse.Namespace) -> str:
    middle = {key: median(run.seconds for run in runs) for key, runs in results.items()}
    lines = [
        f"tokenizer {given.tokenizer_path.name}, seq_len {given.seq_len}, num_proc {given.num_proc}, {given.rounds} "
        f"rounds:\n",
        "| MB | pipeline | seconds (least to most) | MB/s | share of the limit | CPU s | peak MB | ids of text as the "
        "limit |",
        "|---" * 8 + "|",
    ]
    for (megabytes, pipeline), runs in results.items():
        seconds, least = middle[megabytes, pipeline], results[megabytes, LIMIT]
        cells = [
            str(megabytes),
            LIMIT if pipeline == LIMIT else f"moai {pipeline}",
            f"{seconds:.2f} ({min(r.seconds for r in runs):.2f} to {max(r.seconds for r in runs):.2f})",
            f"{megabytes / seconds:.1f}",
            f"{middle[megabytes, LIMIT] / seconds:.1%}",
            f"{median(r.cpu_seconds for r in runs):.2f}",
            f"{median(r.peak_bytes for r in runs) / 1e6:.0f}",
            "yes" if {r.tokens for r in runs} == {least[0].tokens} else "no",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(given.megabytes) > 1:
        first, last = min(given.megabytes), max(given.megabytes)
        more = {pipeline: middle[last, pipeline] - middle[first, pipeline] for pipeline in [LIMIT, *given.packing]}
        said = ", ".join(
            f"moai {pipeline} {(last - first) / more[pipeline]:.1f} MB/s = {more[LIMIT] / more[pipeline]:.1%}"
            for pipeline in given.packing
        )
        lines.append(f"\nAfter the first {first} MB: limit {(last - first) / more[LIMIT]:.1f} MB/s, {said}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
