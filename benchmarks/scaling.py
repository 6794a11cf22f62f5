"""How moai's cost grows: with the input, doubled four times, with the workers, and with what changed since the last
time.

    python benchmarks/scaling.py FILES... --tokenizer_path DIR [--megabytes 100 200 400 800 1600] [--num_proc 1 2]
    [--rounds 3] python benchmarks/scaling.py FILES... --tokenizer_path DIR --rerun [--megabytes 1600] [--parts 100]

The first prepares each size with each number of workers into a new cache; without --num_proc 1, 2 and, where there are
as many cores, 4. "Against the smallest" is the time for a MB over that of the smallest size with as many workers: 1.00
is linear, and less is start-up that weighs less.

The second gives one size as many files, prepares them once, and then again: with nothing changed, with one file
changed, and with one file changed and
--rehash, which reads everything instead of trusting the files' stamps. Stamps that are younger than two seconds prove
nothing, so it waits before each run until they do. "GB/s" is over the part that did not change.

FILES (JSON lines with `text`) are repeated to each size and read once before every run. Interleaved rounds, medians.
Peak memory is the proportional set size of the whole tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from corpus import repeat
from measure import CommandFailed, Measured, measure
from prepare import ENVIRONMENT

Runs = list[Measured]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megabytes", nargs="+", type=int)
    parser.add_argument("--num_proc", nargs="+", type=int, default=[n for n in (1, 2, 4) if n <= (os.cpu_count() or 1)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--packing", default="wrapped")
    parser.add_argument("--rerun", action="store_true")
    parser.add_argument("--parts", type=int, default=100, help="files that --rerun gives")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--limit_seconds", type=float, default=1800, help="of one run")
    given = parser.parse_args()
    given.tokenizer_path, given.work = given.tokenizer_path.resolve(), (given.work / "scaling").resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        print(reruns(given) if given.rerun else growth(given))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    return 0


def prepare(data: Path, cache: Path, num_proc: int, given: argparse.Namespace, *flags: str) -> Measured:
    """One preparation, of files that lie in the page cache."""
    for path in [data] if data.is_file() else data.iterdir():
        path.read_bytes()
    os.sync()
    command = [
        sys.executable,
        "-m",
        "moai",
        "prepare",
        "--dataset",
        data,
        "--tokenizer_path",
        given.tokenizer_path,
        "--packing",
        given.packing,
        "--seq_len",
        given.seq_len,
        "--num_proc",
        num_proc,
        "--cache_dir",
        cache,
        *flags,
    ]
    environment = {name: value.format(out=cache) for name, value in ENVIRONMENT.items()}
    return measure([str(word) for word in command], environment=environment, limit_seconds=given.limit_seconds)


def growth(given: argparse.Namespace) -> str:
    sizes, cache = given.megabytes or [100, 200, 400, 800, 1600], given.work / "cache"
    runs: dict[tuple[int, int], Runs] = {}
    files: dict[tuple[int, int], int] = {}
    prepare(
        repeat(given.files, 1, given.work / "data.jsonl"), cache, 1, given
    )  # unmeasured: modules are compiled and read
    for megabytes in sizes:
        data = repeat(given.files, megabytes, given.work / "data.jsonl")
        for number in range(given.rounds):
            for workers in given.num_proc:
                shutil.rmtree(cache, ignore_errors=True)
                measured = prepare(data, cache, workers, given)
                _say(f"{megabytes} MB, {workers} workers, round {number + 1}", measured)
                runs.setdefault((megabytes, workers), []).append(measured)
                files[megabytes, workers] = len({path.stat().st_ino for path in cache.rglob("*") if path.is_file()})
    lines = [
        f"tokenizer {given.tokenizer_path.name}, seq_len {given.seq_len}, {given.packing}, {given.rounds} rounds:\n",
        "| MB | workers | seconds (least to most) | seconds a MB | against the smallest | against the fewest workers | "
        "MB/s | CPU s | peak PSS MB | files |",
        "|---" * 10 + "|",
    ]
    for workers in given.num_proc:
        smallest = _seconds(runs[sizes[0], workers]) / sizes[0]
        for megabytes in sizes:
            own = runs[megabytes, workers]
            seconds, fewest = _seconds(own), _seconds(runs[megabytes, given.num_proc[0]])
            lines.append(
                f"| {megabytes} | {workers} | {_range(own)} | {seconds / megabytes:.5f} | "
                f"{seconds / megabytes / smallest:.2f} | {fewest / seconds:.2f} times as fast | "
                f"{megabytes / seconds:.1f} | {median(run.cpu_seconds for run in own):.2f} | "
                f"{median(run.peak_bytes for run in own) / 1e6:.0f} | {files[megabytes, workers]} |"
            )
    return "\n".join(lines)


def reruns(given: argparse.Namespace) -> str:
    megabytes, cache, workers = (given.megabytes or [1600])[-1], given.work / "cache", given.num_proc[-1]
    parts = deal(repeat(given.files, megabytes, given.work / "data.jsonl"), given.parts, given.work / "parts")
    total = sum(path.stat().st_size for path in parts)
    runs: dict[str, Runs] = {}
    changes = iter(range(10**9))

    def one_file() -> int:
        return change(parts[next(changes) % len(parts)])

    ways: dict[str, tuple[Callable[[], int], tuple[str, ...]]] = {
        "nothing changed": (lambda: 0, ()),
        "one file changed": (one_file, ()),
        "nothing changed, --rehash": (lambda: 0, ("--rehash",)),
        "one file changed, --rehash": (one_file, ("--rehash",)),
    }
    unchanged = dict.fromkeys(ways, total)
    for number in range(given.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        wait_until_stamps_prove(parts)
        runs.setdefault("the first time", []).append(prepare(given.work / "parts", cache, workers, given))
        _say(f"the first time, round {number + 1}", runs["the first time"][-1])
        for name, (do, flags) in ways.items():
            unchanged[name] = total - do()
            wait_until_stamps_prove(parts)
            runs.setdefault(name, []).append(prepare(given.work / "parts", cache, workers, given, *flags))
            _say(f"{name}, round {number + 1}", runs[name][-1])
    lines = [
        f"{total / 1e6:.0f} MB in {len(parts)} files, tokenizer {given.tokenizer_path.name}, seq_len {given.seq_len}, "
        f"{given.packing}, "
        f"{workers} workers, {given.rounds} rounds:\n",
        "| run | seconds (least to most) | GB/s | times as fast as the first | CPU s | peak PSS MB |",
        "|---" * 6 + "|",
    ]
    first = _seconds(runs["the first time"])
    for name, own in runs.items():
        rate = unchanged.get(name, total) / _seconds(own) / 1e9
        lines.append(
            f"| {name} | {_range(own)} | {rate:.3f} | {first / _seconds(own):.1f} | "
            f"{median(run.cpu_seconds for run in own):.2f} | "
            f"{median(run.peak_bytes for run in own) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def deal(data: Path, number: int, folder: Path) -> list[Path]:
    """The lines of a file as `number` files one behind the other, each no larger than its share, so that a share that
    is a shard's worth makes one.
    """
    folder.mkdir()
    share, parts = data.stat().st_size // number, [folder / f"{part:05d}.jsonl" for part in range(number)]
    with open(data, "rb") as lines:
        line = lines.readline()
        for part in parts:
            with open(part, "wb") as out:
                while line and out.tell() + len(line) <= share:
                    out.write(line)
                    line = lines.readline()
    data.unlink()
    return parts


def change(path: Path) -> int:
    """Give every record of a file a new field, as an editor would: a new file under the old name. Returns its size."""
    text = path.read_bytes().replace(b'{"copy":', b'{"again":%d,"copy":' % time.time_ns())
    staged = path.with_suffix(".new")
    staged.write_bytes(text)
    os.replace(staged, path)
    return len(text)


def wait_until_stamps_prove(parts: list[Path]) -> None:
    youngest = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in (path.stat() for path in parts))
    time.sleep(max(0.0, 2.1 - (time.time_ns() - youngest) / 1e9))


def _say(what: str, measured: Measured) -> None:
    print(
        f"{what}: {measured.seconds:.2f} s, {measured.cpu_seconds:.2f} CPU s, {measured.peak_bytes / 1e6:.0f} MB",
        file=sys.stderr,
        flush=True,
    )


def _seconds(runs: Runs) -> float:
    return median(run.seconds for run in runs)


def _range(runs: Runs) -> str:
    return f"{_seconds(runs):.2f} ({min(run.seconds for run in runs):.2f} to {max(run.seconds for run in runs):.2f})"


if __name__ == "__main__":
    sys.exit(main())
