"""Peak memory against input size: the process tree of `moai prepare`, and of the usual `datasets` pipeline beside it.

    python benchmarks/memory.py FILES... [--megabytes 125 250 500 1000] [--peer_megabytes 125] [--num_proc 2]

FILES are repeated (each copy with a number in its records, so that no two shards are equal) until the size is reached.
Memory is the proportional set size summed over the tree (benchmarks/measure.py); wall-clock seconds come with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from corpus import repeat
from measure import CommandFailed, measure

PEER = Path(__file__).parent / "peers" / "guides.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", default="tokenizers/demo")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[125, 250, 500, 1000])
    parser.add_argument("--peer_megabytes", nargs="*", type=int, default=[125])
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    print("| pipeline | input MB | seconds | peak PSS of the tree, MB | against the first |\n|---|---|---|---|---|")
    first = 0.0
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        for megabytes in given.megabytes:
            data = repeat(given.files, megabytes, Path(folder) / "data.jsonl")
            command = [
                sys.executable,
                "-m",
                "moai",
                "prepare",
                "--dataset",
                str(data),
                "--tokenizer_path",
                given.tokenizer_path,
                "--packing",
                "wrapped",
                "--cache_dir",
                f"{folder}/cache-{megabytes}",
                "--num_proc",
                str(given.num_proc),
            ]
            seconds, peak = run(command)
            first = first or peak
            print(f"| moai prepare | {megabytes} | {seconds:.1f} | {peak:.0f} | {peak / first:.2f} |", flush=True)
        for megabytes in given.peer_megabytes:
            data = repeat(given.files, megabytes, Path(folder) / "data.jsonl")
            seconds, peak = run(
                [
                    sys.executable,
                    str(PEER),
                    str(data),
                    f"{folder}/peer-{megabytes}",
                    given.tokenizer_path,
                    "2048",
                    str(given.num_proc),
                ]
            )
            print(
                f"| datasets: filter, map, group, save_to_disk | {megabytes} | {seconds:.1f} | {peak:.0f} | "
                f"{peak / first:.2f} |",
                flush=True,
            )
    return 0


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak megabytes) of a command and all its descendants."""
    try:
        measured = measure(command)
    except CommandFailed as error:
        sys.exit(str(error))
    return measured.seconds, measured.peak_bytes / 10**6


if __name__ == "__main__":
    sys.exit(main())
