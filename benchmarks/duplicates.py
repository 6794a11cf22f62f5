"""Near copies: how fast they are signed, how many of them are found, and what a corpus of a billion documents costs.

    .venv/bin/python benchmarks/duplicates.py speed --data ../shared/data [--datatrove DIR] [--rounds 3]
    .venv/bin/python benchmarks/duplicates.py recall [--documents 20000]
    .venv/bin/python benchmarks/duplicates.py code --data ../shared/data
    .venv/bin/python benchmarks/duplicates.py scale [--documents 1000000]
    .venv/bin/python benchmarks/duplicates.py decide [--documents 1000000]

CPU seconds of one process unless it says otherwise; ways that are compared take turns. DIR is where `pip install
--target DIR datatrove` put it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

from moai.cache.staging import attempt
from moai.core.distributed import Ranks
from moai.engine.pipeline import Meter, tallied
from moai.engine.progress import Progress
from moai.prepared.manifest import Prepared
from moai.pretraining.assembly import complete, executor_of, find, streams
from moai.pretraining.duplicates import Search
from moai.pretraining.judging import judge
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import machine_plan, make_folders, prepare
from moai.quality import plain
from moai.quality.bands import Bands
from moai.quality.corpus import Corpus, ShardSidecars
from moai.quality.hashes import CONTENT, DocumentHash
from moai.quality.minhash import SIGNATURE, WORDS, MinHash, shingles
from moai.quality.rules import PROFILES

ONE_IN = 20
"""Of the documents only so many are given to datatrove."""
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "recall", "code", "scale", "decide"))
    parser.add_argument("--data", type=Path, help="folder with en.jsonl.zst, ko.jsonl.zst, code.jsonl.zst")
    parser.add_argument("--datatrove", type=Path, help="a folder with datatrove and what it needs")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    globals()[given.what](given)


def texts_of(given: argparse.Namespace, name: str) -> list[str]:
    lines = zstandard.open(given.data / f"{name}.jsonl.zst", "rb").read().splitlines()
    return [text for line in lines[: given.documents] if (text := json.loads(line)["text"]).strip()]


def speed(given: argparse.Namespace) -> None:
    print("| text | way | MB/s | documents |\n|---|---|---:|---:|")
    for name in ("en", "ko", "code"):
        texts = texts_of(given, name)
        ways: dict[str, tuple[list[str], Callable[[list[str]], Any]]] = {
            "moai, hash of the document": (texts, lambda some: measure(DocumentHash(), some)),
            "moai, signature": (texts, lambda some: measure(MinHash(), some)),
        }
        if given.datatrove:
            ways["datatrove, signature (14 x 8)"] = (texts[::ONE_IN], datatrove(given.datatrove))
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(given.rounds + 1):
            for way, (some, run) in ways.items():
                batch = pa.record_batch([pa.array(some, pa.large_string())], names=["text"])
                began = time.process_time()
                run(batch if way.startswith("moai") else some)  # type: ignore[arg-type]
                if round_:
                    seconds[way].append(time.process_time() - began)
        for way, (some, _) in ways.items():
            megabytes = sum(len(text.encode()) for text in some) / 1e6
            print(f"| {name} | {way} | {megabytes / median(seconds[way]):,.2f} | {len(some):,} |", flush=True)


def measure(signal: Any, batch: Any) -> Any:
    return [signal.measure(batch.slice(at, 1000)) for at in range(0, batch.num_rows, 1000)]


def datatrove(folder: Path) -> Callable[[list[str]], Any]:
    """Its own 5-grams and signature on moai's words, which are cheaper than its own. Its default xxhash takes no str
    since xxhash 4, so that it hashes by sha1, as FineWeb did.
    """
    sys.path.append(str(folder))
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.hashing import HashConfig

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return plain.words_of(text)

    minhash.load_word_tokenizer = lambda _: Words()
    hashing = HashConfig(hash_fc="sha1")
    config = minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashing)
    signer = minhash.MinhashDedupSignature("/tmp/unused", config=config)
    return lambda texts: [signer.get_signature(signer.get_shingles(text)) for text in texts if plain.words_of(text)[5:]]


def recall(given: argparse.Namespace) -> None:
    """Near copies at known similarities among documents of their own; brute force over all pairs is the truth."""
    texts = planted(given.documents or 20_000)
    sets = [set_of(text) for text in texts]
    began = time.perf_counter()
    truth = all_pairs(sets, 0.5)
    seconds = time.perf_counter() - began
    print(f"{len(texts):,} documents, all pairs compared in {seconds:.0f} s: {len(truth):,} at .5 and above")
    with tempfile.TemporaryDirectory() as folder:
        prepared, seconds = judged(Path(folder), texts)
        found = goes_for(prepared)
        print(f"judged in {seconds:.1f} s; {len(found):,} go")
    sizes = [(0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1.01)]
    wrong = [pair for pair in found if likeness(sets, *pair) < 0.8]
    order = sorted(range(len(texts)), key=lambda at: xxhash.xxh3_128_digest(texts[at].encode()))
    stays, goes = by_force(order, truth, 0.8)
    print(f"precision: {1 - len(wrong) / max(1, len(found)):.4f}; by force {len(goes):,} go")
    gone = {one for one, _ in found}
    print("| similarity to the nearest that stays | documents that go by force | of them found |\n|---|---:|---:|")
    for least, most in sizes:
        wanted = [one for one, best in goes.items() if least <= best < most]
        share = sum(one in gone for one in wanted) / max(1, len(wanted))
        print(f"| {least} to {min(most, 1)} | {len(wanted):,} | {share:.4f} |")
    high = [one for one, best in goes.items() if best >= 0.85]
    print(f"recall at .85 and above: {sum(one in gone for one in high) / max(1, len(high)):.4f} of {len(high):,}")
    print(f"kept by force {len(stays):,}, kept {len(texts) - len(gone):,}")


def planted(number: int) -> list[str]:
    rng, found = random.Random(11), list[str]()
    vocabulary = [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{n:x}" for n in range(30_000)]
    while len(found) < number:
        base = rng.choices(vocabulary, k=rng.randrange(60, 250))
        found.append(" ".join(base))
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
            # A changed word changes five 5-grams of either.
            target = rng.uniform(0.5, 0.97)
            changes = max(1, round(len(base) * (1 - target) / (1 + target) / 5))
            near = list(base)
            for place in rng.sample(range(len(near)), changes):
                near[place] = f"x{rng.randrange(10**8)}"
            found.append(" ".join(near))
        if rng.random() < 0.05:
            found.append(" ".join(base))
    rng.shuffle(found)
    return found[:number]


def set_of(text: str) -> Any:
    words = text.split()
    return np.unique([hash(tuple(words[at : at + 5])) for at in range(max(1, len(words) - 4))])


def likeness(sets: list[Any], one: int, other: int) -> float:
    both = len(np.intersect1d(sets[one], sets[other], assume_unique=True))
    return both / (len(sets[one]) + len(sets[other]) - both)


def all_pairs(sets: list[Any], least: float) -> dict[tuple[int, int], float]:
    """Every pair that shares a 5-gram is compared; one that shares none has a similarity of 0."""
    grams, holders = np.concatenate(sets), np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    order = np.lexsort((holders, grams))
    grams, holders = grams[order], holders[order]
    shared: Counter[tuple[int, int]] = Counter()
    for group in np.split(holders, np.flatnonzero(grams[1:] != grams[:-1]) + 1):
        if len(group) > 1:
            shared.update(itertools.combinations(group.tolist(), 2))
    return {
        pair: value
        for pair, both in shared.items()
        if (value := both / (len(sets[pair[0]]) + len(sets[pair[1]]) - both)) >= least
    }


def by_force(order: list[int], truth: dict[tuple[int, int], float], least: float) -> tuple[set[int], dict[int, float]]:
    near: dict[int, list[tuple[int, float]]] = {}
    for (one, other), value in truth.items():
        if value >= least:
            near.setdefault(one, []).append((other, value))
            near.setdefault(other, []).append((one, value))
    stays, goes = set[int](), dict[int, float]()
    for at in order:
        likes = [value for other, value in near.get(at, ()) if other in stays]
        if likes:
            goes[at] = max(likes)
        else:
            stays.add(at)
    return stays, goes


def judged(folder: Path, texts: list[str], **settings: Any) -> tuple[Prepared, float]:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        dataset=(str(folder / "data.jsonl"),),
        tokenizer_path=str(ROOT / "tokenizers" / "demo"),
        cache_dir=str(folder / "cache"),
        packing="bfd_split",
        dedup="minhash",
        num_proc=0,
        shard_bytes=4_000_000,
        **settings,
    )
    began = time.perf_counter()
    return prepare(config, here=Ranks()), time.perf_counter() - began


def goes_for(prepared: Prepared) -> list[tuple[int, int]]:
    """(a document, the one that stays in its place), by their lines."""
    rows, starts = [], [0]
    for number in range(len(prepared.content["shards"])):
        with pa.memory_map(str(prepared.path / f"verdicts-{number:05d}.arrow")) as file:
            rows += pa.ipc.open_file(file).read_all().to_pylist()
        starts.append(len(rows))
    return [
        (at, starts[row["keeper_shard"]] + row["keeper_row"])
        for at, row in enumerate(rows)
        if row["keeper_shard"] is not None
    ]


def code(given: argparse.Namespace) -> None:
    """Files that share a licence header: what goes below the threshold."""
    texts = texts_of(given, "code")
    with tempfile.TemporaryDirectory() as folder:
        prepared, _ = judged(Path(folder), texts)
        found = goes_for(prepared)
    values = [jaccard_of(texts[one], texts[other]) for one, other in found]
    below = sum(value < 0.8 for value in values)
    print(f"{len(texts):,} files of code, {len(found):,} go, {below} of them below .8 (lowest {min(values):.3f})")


def jaccard_of(one: str, other: str) -> float:
    grams, ends = shingles(pa.array([one, other], pa.large_string()))
    first, second = {*grams[: ends[1]].tolist()}, {*grams[ends[1] :].tolist()}
    return len(first & second) / len(first | second)


def generated(folder: Path, documents: int, copies: float = 0.3, shard: int = 2500) -> Corpus:
    """Sidecars of as many documents, of which a share are near copies, in clusters of five on average."""
    rng = np.random.default_rng(0)
    shards = []
    bases = rng.integers(0, 2**64, (max(1, int(documents * copies) // 5), len(SIGNATURE)), np.uint64)
    for number in range(-(-documents // shard)):
        rows = min(shard, documents - number * shard)
        slots = rng.integers(0, 2**64, (rows, len(SIGNATURE)), np.uint64)
        near = np.flatnonzero(rng.random(rows) < copies)
        slots[near] = bases[rng.integers(0, len(bases), len(near))]
        changed = slots.view(np.uint8)
        away = (rng.random((rows, 112)) < 0.08) & np.isin(np.arange(rows), near)[:, None]
        changed[away] = rng.integers(0, 256, int(away.sum()))
        columns = dict(zip(SIGNATURE, slots.T)) | {name: rng.integers(0, 2**64, rows, np.uint64) for name in WORDS}
        files = {}
        for signal, table in (
            ("min_hash", columns),
            ("document_hash", {name: rng.integers(0, 2**64, rows, np.uint64) for name in CONTENT}),
        ):
            batch = pa.record_batch([pa.array(np.ascontiguousarray(one)) for one in table.values()], names=list(table))
            path = folder / f"{signal}-{number:06d}.arrow"
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            files[signal] = str(path)
        shards.append(ShardSidecars(rows, files, files))
    return Corpus(tuple(shards))


def scale(given: argparse.Namespace) -> None:
    documents = given.documents or 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        corpus = generated(Path(folder), documents)
        disk = sum(path.stat().st_size for path in Path(folder).iterdir())
        source = Bands(name="bands", corpus=corpus, slots=8)
        before, began, pairs, most = peak(), time.process_time(), 0, 0.0
        for shard in source.shards():
            one = time.process_time()
            with tallied():
                pairs += sum(batch.num_rows for batch in source.read(shard, Meter()))
            most = max(most, time.process_time() - one)
        seconds = time.process_time() - began
    print(
        f"| {documents:,} | {disk / documents:.0f} bytes | {seconds:.1f} s | {seconds / documents * 1e6:.2f} us | "
        f"{most:.1f} s | {peak() - before:,.0f} MB | {pairs:,} |"
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def decide(given: argparse.Namespace) -> None:
    """Another threshold over documents that were measured: CPU seconds of the decision."""
    rng = random.Random(2)
    vocabulary = [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{n:x}" for n in range(5000)]
    with tempfile.TemporaryDirectory() as name:
        folder, last = Path(name), ""
        with open(folder / "data.jsonl", "w") as file:
            for number in range(given.documents or 1_000_000):
                words = rng.choices(vocabulary, k=rng.randrange(20, 50))
                if number % 10 == 0 and last:  # a near copy of one shortly before
                    words = last.split()
                    words[rng.randrange(len(words))] = f"x{number}"
                last = " ".join(words)
                file.write(json.dumps({"text": last}) + "\n")
        stages = [decision(folder, minimum) for minimum in (20, 21, 25)]
    print("| profile | measuring | deciding | of it, looking for copies | documents | dropped | copies |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, stage in zip(("first", "another threshold", "another threshold"), stages):
        print(f"| {name} | {' | '.join(stage)} |")


def decision(folder: Path, minimum: float) -> list[str]:
    config = DataConfig(
        dataset=(str(folder / "data.jsonl"),),
        tokenizer_path=str(ROOT / "tokenizers" / "demo"),
        cache_dir=str(folder / "cache"),
        quality={"gopher.min_words": minimum, "gopher.max_hashes": 0.1, **PROFILES["repetition"]},
        dedup="minhash",
        num_proc=0,
    )
    found = find(config)
    wanted = complete(found)
    make_folders(wanted.cache)
    searching, deciding = Search.duplicates, [0.0, 0.0]
    executor = executor_of(found, machine_plan(found, {}, Ranks(), {}))

    def timed(search: Search, kept: Any) -> Any:
        began = time.process_time()
        duplicates = searching(search, kept)
        deciding[1] = time.process_time() - began
        return duplicates

    Search.duplicates = timed  # type: ignore[method-assign]
    measured = Progress.end

    def end(progress: Progress) -> None:
        measured(progress)
        if progress.doing == "Measuring":
            deciding[0] = time.process_time()

    Progress.end = end  # type: ignore[method-assign]
    began = time.process_time()
    with attempt(wanted.cache, wanted.key) as staging:
        inputs = streams(wanted, staging, 4 << 20)
        judgement = judge(wanted, inputs, executor, staging, label="", report=lambda _: None)
    ended = time.process_time()
    Search.duplicates, Progress.end = searching, measured  # type: ignore[method-assign]
    total = judgement.tally.sources["data.jsonl"]
    counts = [f"{total[name]:,}" for name in ("documents", "dropped", "duplicates")]
    return [f"{deciding[0] - began:.1f} s", f"{ended - deciding[0]:.2f} s", f"{deciding[1]:.2f} s", *counts]


if __name__ == "__main__":
    main()
