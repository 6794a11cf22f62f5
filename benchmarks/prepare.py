"""moai against the pipelines people use for the same work, on the same text: interleaved rounds, medians, and ratios.

    python benchmarks/prepare.py FILES... --tokenizer_path DIR [--megabytes 50 400] [--rounds 3] [--peers moai guides
    gigatoken ...] python benchmarks/prepare.py --table WORK/results.jsonl

FILES (JSON lines with `text`) are repeated to each size and read once before every run, so that all find them in the
page cache; datatrove and LitData, which share work by the file, get the same lines dealt into 8 files. Every run starts
from nothing: moai has a new cache each time, and what a run wrote is counted, then deleted and synced before the next
begins. One unmeasured run on 1 MB comes first. The peers live in an environment of their own, made once from
requirements-peers.txt; `guides` runs in moai's. Each run adds a line to WORK/results.jsonl, and the table is made from
all of its lines, so a benchmark that was stopped is continued by calling it again; delete the file to begin anew.

"same ids": the count and the sum of all ids equal moai's, ends of documents included, whatever their order. Where the
tokenizer has a template of its own (a BOS, [CLS] and [SEP]), guides, Megatron's loop and LitData add its tokens to
every document, and their rows say no; Megatron's loop gives an empty document no end. With more cores than two, run all
of it under `taskset -c 0,1`: some libraries start a thread for every core they see.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from corpus import repeat
from measure import CommandFailed, measure
from peers import count

HERE = Path(__file__).parent
PARTS = 8


@dataclass(frozen=True)
class Peer:
    says: str
    script: str
    count: Callable[[Path], tuple[int, int]]
    by_file: bool = False
    in_own_environment: bool = True
    extra: tuple[str, ...] = ()


PEERS = {
    "guides": Peer(
        "datasets: filter, map, group, save_to_disk", "guides.py", count.arrow_rows, in_own_environment=False
    ),
    "datatrove": Peer("datatrove DocumentTokenizer", "datatrove_tokens.py", count.token_files, by_file=True),
    "megatron": Peer("Megatron preprocess_data loop", "megatron_loop.py", count.indexed),
    "gigatoken": Peer("Megatron files by gigatoken, numpy ends", "megatron_gigatoken.py", count.indexed),
    "gigatoken_awkward": Peer(
        "Megatron files by gigatoken, awkward ends", "megatron_gigatoken.py", count.indexed, extra=("--awkward",)
    ),
    "litdata": Peer("LitData optimize, TokensLoader", "litdata_tokens.py", count.litdata_chunks, by_file=True),
}
MOAI = "moai"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "",
    "DATA_OPTIMIZER_CACHE_FOLDER": "{out}/rest/chunks",
    "DATA_OPTIMIZER_DATA_CACHE_FOLDER": "{out}/rest/data",
}
"""For every pipeline. Compiled modules are kept, as pip keeps those of the peers; the last two are where LitData puts
its chunks before they are moved.
"""


@dataclass(frozen=True)
class Result:
    """One run, as a line of results.jsonl."""

    tokenizer: str
    seq_len: int
    num_proc: int
    megabytes: int
    pipeline: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output_bytes: int
    left_bytes: int
    """Everything else it left on disk: caches, logs. A file linked twice counts once."""
    tokens: int
    ids_sum: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, metavar="DIR")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[50, 400])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--num_proc", type=int, default=2, help="of the peers; moai chooses for itself")
    parser.add_argument("--peers", nargs="+", choices=[MOAI, *PEERS], default=[MOAI, *PEERS])
    parser.add_argument("--packing", nargs="+", default=["wrapped", "bfd_split"])
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--limit_seconds", type=float, default=1800, help="of one run")
    parser.add_argument("--table", type=Path, metavar="RESULTS.JSONL", help="only print the table of an earlier run")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return 0
    if not given.files or not given.tokenizer_path:
        parser.error("FILES and --tokenizer_path are needed, or --table alone")
    given.tokenizer_path, given.work = (
        given.tokenizer_path.resolve(),
        given.work.resolve(),
    )  # a relative folder could be taken for a name on the hub
    given.work.mkdir(parents=True, exist_ok=True)
    results = given.work / "results.jsonl"
    results.touch()
    failed = run_all(given)
    print(table(results))
    return 1 if failed else 0


def run_all(given: argparse.Namespace) -> int:
    """How many runs failed. Round 0 warms up, unmeasured; a pipeline that fails there is left out of the others."""
    pipelines = [f"{MOAI} {packing}" for packing in given.packing if MOAI in given.peers] + [
        name for name in given.peers if name != MOAI
    ]
    python = (
        peers_python(given.work / ".venv-peers")
        if any(name in PEERS and PEERS[name].in_own_environment for name in pipelines)
        else Path(sys.executable)
    )
    data, failed = given.work / "data", 0
    for megabytes, rounds in [(1, range(1)), *((size, range(1, given.rounds + 1)) for size in given.megabytes)]:
        lay_out(given.files, megabytes, data)
        for number in rounds:
            for pipeline in list(pipelines):
                try:
                    result = run(pipeline, data, megabytes, python, given)
                except CommandFailed as error:
                    print(f"{pipeline}: {error}", file=sys.stderr, flush=True)
                    failed += 1
                    if number == 0:
                        pipelines.remove(pipeline)
                    continue
                if number > 0:
                    print(
                        f"{megabytes} MB, round {number}: {pipeline} {result.seconds:.2f} s, {result.cpu_seconds:.2f} "
                        f"CPU s",
                        file=sys.stderr,
                        flush=True,
                    )
                    with open(given.work / "results.jsonl", "a") as results:
                        results.write(json.dumps(asdict(result)) + "\n")
    shutil.rmtree(data)
    return failed


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, made anew when the requirements are others than it was made from."""
    requirements, installed = HERE / "requirements-peers.txt", folder / "installed.txt"
    python = folder / "bin" / "python"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True, stdout=sys.stderr
        )
        shutil.copy(requirements, installed)
    return python


def lay_out(files: list[Path], megabytes: int, data: Path) -> None:
    shutil.rmtree(data, ignore_errors=True)
    (data / "parts").mkdir(parents=True)
    whole = repeat(files, megabytes, data / "data.jsonl")
    with ExitStack() as opened:
        parts = [opened.enter_context(open(data / "parts" / f"{number}.jsonl", "wb")) for number in range(PARTS)]
        for number, line in enumerate(opened.enter_context(open(whole, "rb"))):
            parts[number % PARTS].write(line)


def run(pipeline: str, data: Path, megabytes: int, python: Path, given: argparse.Namespace) -> Result:
    out, peer = given.work / "out", PEERS.get(pipeline)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in data.rglob("*.jsonl"):
        path.read_bytes()
    os.sync()  # else this run waits for what the one before it wrote
    command = (
        peer_command(peer, data, out, python, given)
        if peer
        else moai_command(pipeline.removeprefix(f"{MOAI} "), data, out, given)
    )
    try:
        measured = measure(
            [str(word) for word in command],
            environment={name: value.format(out=out) for name, value in ENVIRONMENT.items()},
            limit_seconds=given.limit_seconds,
        )
        saved = out / "saved" if peer else Path(measured.output.splitlines()[-1])
        tokens, ids_sum = peer.count(saved) if peer else count.arrow_rows(saved)
        written, all_written = disk_bytes(saved), disk_bytes(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Result(
        given.tokenizer_path.name,
        given.seq_len,
        given.num_proc,
        megabytes,
        pipeline,
        measured.seconds,
        measured.cpu_seconds,
        measured.peak_bytes,
        written,
        all_written - written,
        tokens,
        ids_sum,
    )


def moai_command(packing: str, data: Path, out: Path, given: argparse.Namespace) -> list[object]:
    return [
        sys.executable,
        "-m",
        "moai",
        "prepare",
        "--dataset",
        data / "data.jsonl",
        "--tokenizer_path",
        given.tokenizer_path,
        "--packing",
        packing,
        "--seq_len",
        given.seq_len,
        "--cache_dir",
        out,
    ]


def peer_command(peer: Peer, data: Path, out: Path, python: Path, given: argparse.Namespace) -> list[object]:
    """Every script takes the same words, writes its result to OUT/saved and what else it leaves to OUT/rest."""
    eos = json.loads((given.tokenizer_path / "tokenizer_config.json").read_bytes())["eos_token"]
    return [
        python if peer.in_own_environment else sys.executable,
        HERE / "peers" / peer.script,
        data / "parts" if peer.by_file else data / "data.jsonl",
        out,
        given.tokenizer_path,
        given.seq_len,
        given.num_proc,
        eos if isinstance(eos, str) else eos["content"],
        *peer.extra,
    ]


def disk_bytes(folder: Path) -> int:
    found = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


def table(path: Path) -> str:
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, int, int, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.tokenizer, result.seq_len, result.num_proc, result.megabytes), []).append(result)
    return "\n\n".join(group_table(*group, found) for group, found in groups.items())


def group_table(tokenizer: str, seq_len: int, num_proc: int, megabytes: int, results: list[Result]) -> str:
    """Medians; a ratio is a pipeline's median over that of moai, so above 1 moai needs less."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.pipeline, []).append(result)
    ours = [name for name in by_name if name not in PEERS]
    first = results[0] if not ours else by_name[ours[0]][0]
    against = "".join(f" wall / CPU / memory against {name} |" for name in ours)
    lines = [
        f"{megabytes} MB, tokenizer {tokenizer}, seq_len {seq_len}, num_proc {num_proc}:\n",
        "| pipeline | runs | wall s (least to most) | MB/s | CPU s | peak MB | bytes a token | left over MB | tokens | "
        "same ids |" + against,
        "|---" * (10 + len(ours)) + "|",
    ]
    for name, runs in by_name.items():
        seconds, tokens = _median(runs, "seconds"), runs[0].tokens
        same = {(run.tokens, run.ids_sum) for run in runs} == {(first.tokens, first.ids_sum)}
        cells = [
            PEERS[name].says if name in PEERS else name,
            str(len(runs)),
            f"{seconds:.2f} ({min(run.seconds for run in runs):.2f} to {max(run.seconds for run in runs):.2f})",
            f"{megabytes / seconds:.1f}",
            f"{_median(runs, 'cpu_seconds'):.2f}",
            f"{_median(runs, 'peak_bytes') / 1e6:.0f}",
            f"{_median(runs, 'output_bytes') / tokens:.2f}",
            f"{_median(runs, 'left_bytes') / 1e6:.1f}",
            f"{tokens:,}",
            "yes" if same else f"no ({tokens - first.tokens:+,} tokens)",
        ]
        cells += [
            " / ".join(
                f"{_median(runs, of) / _median(by_name[our], of):.2f}"
                for of in ("seconds", "cpu_seconds", "peak_bytes")
            )
            for our in ours
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(runs: list[Result], of: str) -> float:
    return median(getattr(run, of) for run in runs)


if __name__ == "__main__":
    sys.exit(main())
