"""Tokenizer backends: MB/s on one core, and ids compared with the reference on every document and on what has broken
others.

    python benchmarks/backends.py FILES... --tokenizers DIR [--megabytes 20] [--reference_megabytes 3] [--rounds 3]
    [--backends fastokens ...]

FILES are .jsonl or .jsonl.zst with a `text`; DIR holds folders with a tokenizer.json, as corpus.py makes them. Not
called tokenizers.py, since a script's folder comes first where Python looks for modules.

Speed: MB of UTF-8 a CPU second, in a process each time that is held to one core, RAYON_NUM_THREADS=1, the tokenizer
loaded but nothing encoded yet; documents of all FILES, shuffled once, in batches of 4 MB as the pipeline has them;
interleaved, medians (least to most). The reference is given fewer of the same. Equality: each document by itself, by
hash, as the pipeline encodes it: what a backend refuses goes to the reference and is counted. "probe" is what moai asks
before it uses one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash
from nasty import nasty

from moai.core.errors import BackendRefused
from moai.engine import pipeline
from moai.sources.streams import COMPRESSIONS, open_blocks
from moai.tokenizers.backends import BACKENDS, Ids, Offsets, Reference, first_difference, make
from moai.tokenizers.differing_strings import probes
from moai.tokenizers.load import load_tokenizer
from moai.transforms.tokenize import Tokenize

BATCH_BYTES = 4_000_000
FAST = [name for name in BACKENDS if name != "tokenizers"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--backends", nargs="+", choices=FAST, default=FAST)
    parser.add_argument("--megabytes", type=float, default=20, help="given to each fast backend to measure its speed")
    parser.add_argument(
        "--reference_megabytes", type=float, default=3, help="given to the reference to measure its speed"
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folders = sorted(path.parent for path in given.tokenizers.resolve().glob("*/tokenizer.json"))
    if not folders:
        parser.error(f"{given.tokenizers}: holds no folder with a tokenizer.json")
    documents = sum(len(batch) for batch in batches(given.files))
    megabytes = sum(size(text) for batch in batches(given.files) for text in batch) / 1e6
    print(
        f"{documents:,} documents, {megabytes:.1f} MB of text, of which {given.megabytes:g} MB (reference: "
        f"{given.reference_megabytes:g}) were timed\n"
    )
    print(
        "| tokenizer | backend | MB a CPU second | times the reference | documents that differ | refused | nasty texts "
        "that differ | refused | probe |"
    )
    print("|---" * 9 + "|", flush=True)
    wrong = 0
    for folder in folders:
        backends = [name for name in given.backends if refusal(folder, name) is None]
        speeds = measure([*backends, "tokenizers"], folder, given)
        compared = compare(backends, folder, given.files)
        for name in [*given.backends, "tokenizers"]:
            if name in FAST and name not in backends:
                print(f"| {folder.name} | {name} | refuses it: {refusal(folder, name)} | | | | | | |")
                continue
            median, low, high = statistics.median(speeds[name]), min(speeds[name]), max(speeds[name])
            ratio = median / statistics.median(speeds["tokenizers"])
            said = compared.get(name, "| | | |")
            print(
                f"| {folder.name} | {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.1f} | {said} |",
                flush=True,
            )
            wrong += not said.startswith(("0 |", "|"))
    return 1 if wrong else 0


def texts(path: Path) -> Iterator[str]:
    rest = b""
    for block in open_blocks(str(path), COMPRESSIONS.get(path.suffix, ""), 1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (json.loads(line)["text"] for line in lines if line)
    if rest:
        yield json.loads(rest)["text"]


def batches(files: Sequence[Path]) -> Iterator[list[str]]:
    """All documents, about BATCH_BYTES at a time."""
    batch: list[str] = []
    filled = 0
    for path in files:
        for text in texts(path):
            batch.append(text)
            filled += size(text)
            if filled >= BATCH_BYTES:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def refusal(folder: Path, name: str) -> str | None:
    try:
        make(name, load_tokenizer(str(folder)), split_special_tokens=False).load()
    except BackendRefused as error:
        return str(error).replace("|", "\\|")
    return None


# -- speed


def measure(names: Sequence[str], folder: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names:
            amount = given.reference_megabytes if name == "tokenizers" else given.megabytes
            command = [sys.executable, __file__, "--alone", name, str(folder), str(amount), *map(str, given.files)]
            ended = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "RAYON_NUM_THREADS": "1"}
            )
            if ended.returncode:
                sys.exit(f"{name} failed with {ended.returncode}\n{ended.stderr}")
            speeds[name].append(float(ended.stdout.splitlines()[-1]))
            print(f"{folder.name}, round {number + 1}: {name} {speeds[name][-1]:.1f} MB/s", file=sys.stderr, flush=True)
    return speeds


def alone(name: str, folder: str, megabytes: str, *files: str) -> None:
    """Print the MB/s of a backend in this process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    given = drawn([Path(file) for file in files], float(megabytes) * 1e6)
    backend = make(name, load_tokenizer(folder), split_special_tokens=False, threads=1)
    backend.load()
    tokenize = Tokenize(backend=backend, reference=Reference(spec=backend.spec))
    started = time.process_time()
    for batch in given:
        encode(tokenize, batch)
    print(sum(size(text) for batch in given for text in batch) / 1e6 / (time.process_time() - started))


def drawn(files: Sequence[Path], wanted: float) -> list[list[str]]:
    """`wanted` bytes of documents, the same ones first however many are wanted, in batches."""
    everything = [text for path in files for text in texts(path)]
    random.Random(0).shuffle(everything)
    batch: list[str] = []
    made, filled = [batch], 0
    for text in everything:
        if wanted <= 0:
            break
        if filled >= BATCH_BYTES:
            batch, filled = [], 0
            made.append(batch)
        batch.append(text)
        filled += size(text)
        wanted -= size(text)
    return made


# -- equality


def compare(names: Sequence[str], folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """For each backend: documents that differ, documents refused, the same of the nasty texts, what the probe says."""
    spec = load_tokenizer(str(folder))
    reference = Reference(spec=spec)
    table = list(nasty(reference.special_tokens()).values())
    fast = {name: make(name, spec, split_special_tokens=False) for name in names}
    differ, refused = ({name: [0, 0] for name in names} for _ in range(2))
    if not names:
        return {}
    for kind, many in ((0, batches(files)), (1, ([text] for text in table))):
        for number, batch in enumerate(many):
            expected = hashes(*reference.encode_batch(batch))
            for name, backend in fast.items():
                *found, number_refused = encode(Tokenize(backend=backend, reference=reference), batch)
                differ[name][kind] += sum(ours != theirs for ours, theirs in zip(hashes(*found), expected, strict=True))
                refused[name][kind] += number_refused
            if not kind and number % 5 == 0:
                print(
                    f"{folder.name}: batch {number} compared, differing so far: {differ}", file=sys.stderr, flush=True
                )
    asked = list(probes(reference.special_tokens()))
    probed = {
        name: "differs" if first_difference(backend, reference, asked) else "equal" for name, backend in fast.items()
    }
    return {
        name: f"{differ[name][0]:,} | {refused[name][0]:,} | {differ[name][1]} of {len(table)} | {refused[name][1]} | "
        f"{probed[name]}"
        for name in names
    }


def encode(tokenize: Tokenize, batch: list[str]) -> tuple[Ids, Offsets, int]:
    """As the pipeline does it, and how many texts went to the reference."""
    tally = pipeline.Tally()
    token = pipeline._tally.set(tally)
    try:
        return *tokenize._encode(batch), tally.counts["backend.refused"]
    finally:
        pipeline._tally.reset(token)


def hashes(ids: Ids, offsets: Offsets) -> list[str]:
    data: Any = ids.data
    return [xxhash.xxh3_128_hexdigest(data[start:end]) for start, end in pairwise(offsets.tolist())]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
        sys.exit()
    sys.exit(main())
