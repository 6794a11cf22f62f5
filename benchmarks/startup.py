"""What starting costs: importing moai, its command line, small preparations, and the guides' pipeline on the same small
file.

    python benchmarks/startup.py FILES... --tokenizer_path DIR [--rounds 5] [--megabytes 50]

FILES (JSON lines with `text`) are repeated to 1 MB and to --megabytes. Interleaved rounds after one that is not
measured, medians; seconds are those of the whole command, the interpreter's own start (`python -c pass`) included. The
last column is from one more run of each under `python -X importtime`, which every process that moai starts takes over:
which of the large packages any of them imported. Compiled modules are kept, as they are after any installation.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from corpus import repeat
from measure import CommandFailed, Measured, measure
from prepare import ENVIRONMENT, PEERS, peer_command

HEAVY = ("torch", "transformers", "datasets", "pandas", "accelerate")
ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=50, help="of the larger preparation")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--num_proc", type=int, default=2, help="of the guides' pipeline; moai chooses for itself")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    given = parser.parse_args()
    given.tokenizer_path, given.work = given.tokenizer_path.resolve(), (given.work / "startup").resolve()
    for name, megabytes in (("small", 1), ("larger", given.megabytes)):
        (given.work / name).mkdir(parents=True, exist_ok=True)
        repeat(given.files, megabytes, given.work / name / "data.jsonl")
    try:
        print(run_all(given))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    return 0


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """By what a person would call them, in this order: the second preparation of the small file finds what the first
    has made.
    """
    python, out = [sys.executable], given.work / "out"

    def prepare(name: str) -> list[str]:
        words = [
            "-m",
            "moai",
            "prepare",
            "--dataset",
            given.work / name / "data.jsonl",
            "--tokenizer_path",
            given.tokenizer_path,
            "--packing",
            "wrapped",
            "--seq_len",
            given.seq_len,
            "--cache_dir",
            out / "cache",
        ]
        return [*python, *map(str, words)]

    return {
        "python -c pass": [*python, "-c", "pass"],
        "import moai": [*python, "-c", "import moai"],
        "python -m moai --help": [*python, "-m", "moai", "--help"],
        "python -m moai prepare --help": [*python, "-m", "moai", "prepare", "--help"],
        "prepare 1 MB": prepare("small"),
        "prepare 1 MB again": prepare("small"),
        f"prepare {given.megabytes} MB": prepare("larger"),
        "guides' pipeline, 1 MB": [
            str(word) for word in peer_command(PEERS["guides"], given.work / "small", out, Path(sys.executable), given)
        ],
    }


def run_all(given: argparse.Namespace) -> str:
    out, environment = (
        given.work / "out",
        {name: value.format(out=given.work / "out") for name, value in ENVIRONMENT.items()},
    )
    runs: dict[str, list[Measured]] = {}
    for number in range(given.rounds + 1):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, command in commands(given).items():
            os.sync()
            measured = measure(command, environment=environment)
            if number:
                print(
                    f"round {number}: {name} {measured.seconds:.3f} s, {measured.cpu_seconds:.3f} CPU s",
                    file=sys.stderr,
                    flush=True,
                )
                runs.setdefault(name, []).append(measured)
    shutil.rmtree(out)
    out.mkdir()
    lines = [
        f"tokenizer {given.tokenizer_path.name}, seq_len {given.seq_len}, {given.rounds} rounds:\n",
        f"| command | seconds (least to most) | CPU s | peak MB | modules | of {', '.join(HEAVY)} |",
        "|---" * 6 + "|",
    ]
    for name, command in commands(given).items():
        own, modules = runs[name], imported(command, environment)
        seconds = [run.seconds for run in own]
        heavy = ", ".join(package for package in HEAVY if package in modules) or "none"
        lines.append(
            f"| {name} | {median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | "
            f"{median(run.cpu_seconds for run in own):.2f} | "
            f"{median(run.peak_bytes for run in own) / 1e6:.0f} | {len(modules)} | {heavy} |"
        )
    return "\n".join(lines)


def imported(command: list[str], environment: dict[str, str]) -> set[str]:
    """Names of all modules that the command's processes imported; of a package that was only tried
    (moai.core.without_pandas) there is nothing but its name.
    """
    given = {**os.environ, **environment}
    said = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], env=given, cwd=ROOT, capture_output=True, text=True, check=True
    ).stderr
    found = set(re.findall(r"import time: +\d+ \| +\d+ \| +([\w.]+)", said))
    return {name for name in found if name not in HEAVY or any(other.startswith(f"{name}.") for other in found)}


if __name__ == "__main__":
    sys.exit(main())
