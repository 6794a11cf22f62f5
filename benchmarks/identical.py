"""Same input, same bytes: prepare FILES once for every way of working, and compare every byte.

    python benchmarks/identical.py FILES... --tokenizer_path tokenizers/demo [--work DIR]

For each packing, num_proc 0 (serial), 1, 2 and 5 with dataset_batch_size 64 and 4,096 and writer_batch_size 1,000 and
100,000, in ten combinations (or the first --ways of them), prepare into caches of their own. Printed: sha256 over all
data-*.arrow and over the manifest's content part, how many runs gave it, and whether the documents, decoded, are the
input's text. Exit 1 on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import orjson
from tokenizers import Tokenizer

from moai.sources.streams import COMPRESSIONS, open_blocks

SEQ_LEN = 2048
VARIANTS = [
    (0, 64, 1000), (1, 4096, 100_000), (2, 64, 100_000), (5, 4096, 1000), (2, 4096, 1000),
    (0, 4096, 100_000), (1, 64, 1000), (5, 64, 100_000), (2, 64, 1000), (5, 4096, 100_000),
]  # fmt: skip
"""(num_proc, dataset_batch_size, writer_batch_size); the first five hold every value with another."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokenizer_path", default="tokenizers/demo")
    parser.add_argument("--packings", nargs="+", default=["wrapped", "bfd", "bfd_split"])
    parser.add_argument("--shard_bytes", default="16MB")
    parser.add_argument("--ways", type=int, default=len(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    wrong = 0
    print(
        "| packing | runs | shards | sha256 of data-*.arrow | sha256 of the manifest's content | different | documents "
        "decoded |\n|---|---|---|---|---|---|---|"
    )
    for packing in given.packings:
        found: Counter[tuple[str, str, int]] = Counter()
        decoded = ""
        for num_proc, batch, writer in VARIANTS[: given.ways]:
            with tempfile.TemporaryDirectory(dir=given.work) as cache:
                path = prepare(given, packing, num_proc, batch, writer, cache)
                found[fingerprint(path)] += 1
                decoded = decoded or compare_documents(path, packing, given.files, given.tokenizer_path)
        data, content, shards = next(iter(found))
        wrong += len(found) - 1 + (not decoded.startswith("equal"))
        print(
            f"| {packing} | {found.total()} | {shards} | `{data}` | `{content}` | {len(found) - 1} | {decoded} |",
            flush=True,
        )
    return 1 if wrong else 0


def prepare(given: argparse.Namespace, packing: str, num_proc: int, batch: int, writer: int, cache: str) -> Path:
    flags = {
        "--tokenizer_path": given.tokenizer_path,
        "--seq_len": SEQ_LEN,
        "--packing": packing,
        "--cache_dir": cache,
        "--num_proc": num_proc,
        "--dataset_batch_size": batch,
        "--writer_batch_size": writer,
        "--shard_bytes": given.shard_bytes,
    }
    command = [
        sys.executable,
        "-m",
        "moai",
        "prepare",
        "--dataset",
        *given.files,
        *(str(word) for item in flags.items() for word in item),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{shutil.which('python')}: prepare failed\n{ended.stderr}")
    return Path(ended.stdout.splitlines()[-1])


def fingerprint(path: Path) -> tuple[str, str, int]:
    data = hashlib.sha256()
    shards = sorted(path.glob("data-*.arrow"))
    for shard in shards:
        data.update(shard.name.encode())
        data.update(shard.read_bytes())
    content = json.loads((path / "manifest.json").read_bytes())["content"]
    return data.hexdigest(), hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), len(shards)


def texts(files: list[str]) -> Iterator[str]:
    for name in files:
        rest = b""
        for block in open_blocks(name, COMPRESSIONS.get(Path(name).suffix, ""), 4 << 20):
            *lines, rest = (rest + block).split(b"\n")
            yield from (orjson.loads(line)["text"] for line in lines if line.strip())
        if rest.strip():
            yield orjson.loads(rest)["text"]


def compare_documents(path: Path, packing: str, files: list[str], tokenizer_path: str) -> str:
    """Against the texts themselves, through the tokenizer alone: moai's own code is not asked."""
    tokenizer = Tokenizer.from_file(f"{tokenizer_path}/tokenizer.json")
    rows = datasets.load_from_disk(str(path)).with_format("numpy")
    eos = tokenizer.token_to_id("<|endoftext|>")
    pieces: list[bytes] = []
    for row in rows.iter(512):
        for ids, lengths in zip(row["input_ids"], row["seq_lengths"]):
            pieces += [piece.astype(np.uint32).tobytes() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
    if packing == "wrapped":
        stream = np.frombuffer(b"".join(pieces), np.uint32)
        at = 0
        for number, text in enumerate(texts(files)):
            length = len(tokenizer.encode(text, add_special_tokens=False).ids)
            if (
                tokenizer.decode(stream[at : at + length].tolist(), skip_special_tokens=False) != text
                or stream[at + length] != eos
            ):
                return f"document {number} differs"
            at += length + 1
        return (
            f"equal ({number + 1:,} of {number + 1:,})" if at == len(stream) else f"{len(stream) - at} tokens too many"
        )
    left, whole, number = Counter(pieces), 0, 0
    for number, text in enumerate(texts(files), 1):
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
        cut = [ids[first : first + SEQ_LEN] for first in range(0, len(ids) if packing == "bfd_split" else 1, SEQ_LEN)]
        held = [token for piece in cut for token in piece]
        whole += len(held) == len(ids)
        if len(held) == len(ids) and tokenizer.decode(held[:-1], skip_special_tokens=False) != text:
            return f"document {number} does not decode to its text"
        left.subtract(np.array(piece, np.uint32).tobytes() for piece in cut)
    wrong = sum(map(abs, left.values()))
    return (
        f"{wrong} pieces differ" if wrong else f"equal ({whole:,} whole, {number - whole:,} truncated, of {number:,})"
    )


if __name__ == "__main__":
    sys.exit(main())
