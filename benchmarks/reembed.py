"""Chunks per second of re-embedding against the guides' loop and the best fixed batch, same model, same threads:
interleaved rounds, medians, ratios.

    python benchmarks/reembed.py DATABASE --model DIR [--chunks 500] [--rounds 3] [--threads 2] [--ways guides fixed:32
    moai auto] python benchmarks/reembed.py DATABASE --model DIR --memory [--times 1 10] [flags of the command, as
    --precision bfloat16] python benchmarks/reembed.py --second_run 10000 --model DIR

All ways embed the same chunks: those that moai cuts of the database (strategy dynamic), the first `--chunks` of at
least `--least_tokens` tokens, in the order of the documents. A round runs every way once, each in a process of its own
that loads the model before the clock starts; one unmeasured batch comes first.

guides     sentence-transformers `encode` per document batch (300 documents), batch size 1024, in the order of arrival
fixed:N    one `encode` of the whole list with batch size N: 8, 16, 32, 64 and 128 are tried, the best median counts
moai       chunks through moai's Embed: batches of embedding_batch_size, longest first, a token budget a device batch;
           float32
auto       the same with the precision that `--precision auto` chooses on its sample; its cosine to float32 is shown

`--memory` re-embeds the database and one with its documents so many times, each in a process of its own, and shows
stage times and peak memory. With `--model hashing` vectors are hashes and no torch is loaded: what all but the model
holds. `--second_run N` makes a database of N generated documents with a version that the model might have made (its
vectors are hashes), and shows how long the whole command takes then, from its start to its end. With DATABASE it is
that one, which must have version 5 of this model already.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

FIXED = ("fixed:8", "fixed:16", "fixed:32", "fixed:64", "fixed:128")
WAYS = ("guides", *FIXED, "moai", "auto")
SCRIPT = HERE.parent / "scripts" / "migrations" / "re_embed_existing_data_optimized.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", nargs="?", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--chunks", type=int, default=500)
    parser.add_argument("--least_tokens", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--times", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--second_run", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args()
    if flags and not given.memory:
        parser.error(f"unknown: {' '.join(flags)}")
    if given.one:
        print(json.dumps(one(given)))
    elif given.second_run:
        second_run(given)
    elif given.memory:
        memory(given, flags)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, float]]] = {way: [] for way in given.ways}
    for _ in range(given.rounds):
        for way in given.ways:
            command = [
                sys.executable,
                __file__,
                str(given.database),
                "--model",
                given.model,
                "--chunks",
                str(given.chunks),
                "--least_tokens",
                str(given.least_tokens),
                "--one",
                way,
            ]
            done = subprocess.run(
                [*command, "--threads", str(given.threads)],
                env=environment(given.threads),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{way}: {done.stderr[-3000:]}")
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {results[way][-1]}", file=sys.stderr, flush=True)
    rates = {way: median(result["chunks"] / result["seconds"] for result in found) for way, found in results.items()}
    best = max((way for way in rates if way.startswith("fixed")), key=rates.__getitem__, default=None)
    first = next(iter(results.values()))[0]
    print(
        f"{first['chunks']:.0f} chunks of {first['tokens'] / first['chunks']:.0f} tokens, {given.threads} threads, "
        f"medians of {given.rounds} rounds\n"
    )
    print(
        "| way | chunks/s | each round | against guides | against the best fixed batch | least cosine to float32 |\n"
        "|---|---|---|---|---|---|"
    )
    for way, rate in rates.items():
        rounds = ", ".join(f"{result['chunks'] / result['seconds']:.1f}" for result in results[way])
        against = [f"{rate / rates[other]:.2f}" if other in rates else "" for other in ("guides", best)]
        name = f"{way} ({results[way][0]['precision']})" if "precision" in results[way][0] else way
        print(
            f"| {name} | {rate:.1f} | {rounds} | {against[0]} | {against[1]} | {results[way][0].get('cosine', ''):} |"
        )


def environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'tests'}",
    }


def one(given: argparse.Namespace) -> dict[str, object]:
    """One way in this process: seconds for all chunks, the model loaded and warm before."""
    from moai.core.resources import detect
    from moai.reembedding.embed import TokenBudget, encode_all
    from moai.reembedding.encoders import SentenceModel
    from moai.reembedding.options import embedding_batch_size

    model = SentenceModel.find(given.model, threads=given.threads)
    encoder = model.open("float32")
    texts, rows, documents = chunks_of(given, encoder.tokens)
    result: dict[str, object] = {"chunks": len(rows), "tokens": sum(map(len, rows))}
    if given.one in ("moai", "auto"):
        size = embedding_batch_size(detect(Path.cwd()).memory_bytes.value, cuda_bytes=None).value
        if given.one == "auto":
            from moai.reembedding.loading import LoadedWhenNeeded

            exact = encode_all(encoder, rows[::10], TokenBudget())
            lazy = LoadedWhenNeeded(
                model=model,
                precision="auto",
                min_cosine=0.995,
                expected_dim=None,
                sample=lambda tokens: rows[:: max(1, len(rows) // 48)],
            )
            encoder = lazy.encoder
            result |= {
                "precision": lazy.chosen["precision"],
                "cosine": f"{float((exact * encode_all(encoder, rows[::10], TokenBudget())).sum(axis=1).min()):.5f}",
            }
        encode_all(encoder, rows[:16], TokenBudget())
        started = time.perf_counter()
        for start in range(0, len(rows), size):
            encode_all(encoder, rows[start : start + size], TokenBudget())
        return result | {"seconds": time.perf_counter() - started}
    import torch
    from sentence_transformers import SentenceTransformer

    sentence = SentenceTransformer(given.model, device="cpu")
    torch.set_num_threads(given.threads)  # moai's encoder has left another number
    sentence.encode(texts[:16], batch_size=16, show_progress_bar=False)
    started = time.perf_counter()
    if given.one == "guides":
        for batch in document_batches(texts, documents, 300):
            sentence.encode(batch, batch_size=1024, normalize_embeddings=True, show_progress_bar=False)
    else:
        sentence.encode(
            texts, batch_size=int(given.one.partition(":")[2]), normalize_embeddings=True, show_progress_bar=False
        )
    return result | {"seconds": time.perf_counter() - started}


def chunks_of(given: argparse.Namespace, tokens: object) -> tuple[list[str], list[list[int]], list[tuple[str, int]]]:
    """(texts, token ids, document of each), as moai cuts them, in the order of the documents."""
    from moai.reembedding.chunk import Chunk
    from moai.reembedding.documents import LawDocuments

    texts, rows, documents = [], [], []
    chunk = Chunk(strategy="dynamic", tokens=tokens, embedding_batch_size=1024)  # type: ignore[arg-type]
    for batch in chunk(LawDocuments(path=given.database, version_id=0, content_key="", doc_batch_size=300).pages()):
        for row in batch.to_pylist():
            if row["ids"] is not None and len(row["ids"]) >= given.least_tokens and len(rows) < given.chunks:
                texts.append(row["text"])
                rows.append(row["ids"])
                documents.append((row["source_type"], row["source_id"]))
    return texts, rows, documents


def document_batches(texts: list[str], documents: list[tuple[str, int]], size: int) -> list[list[str]]:
    seen: dict[tuple[str, int], int] = {}
    batches: list[list[str]] = []
    for text, document in zip(texts, documents):
        number = seen.setdefault(document, len(seen)) // size
        if number == len(batches):
            batches.append([])
        batches[number].append(text)
    return batches


def memory(given: argparse.Namespace, flags: list[str]) -> None:
    from measure import measure

    print(
        "| documents | chunks | wall s | read | chunk | load | encode | wait | write | peak PSS, MB | of it anonymous "
        "|\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for times in given.times:
            path = Path(folder) / f"{times}.db"
            shutil.copy(given.database, path)
            path.chmod(0o644)
            grow(path, times)
            asked = ["--db", str(path), "--version-id", "5", "--chunking-strategy", "dynamic"]
            hashing = "import sys, tiny_law; sys.exit(tiny_law.main(sys.argv[1:]))"
            command = (
                [sys.executable, "-c", hashing, *asked]
                if given.model == "hashing"
                else [sys.executable, str(SCRIPT), *asked, "--model", given.model]
            )
            done = measure([*command, *flags], environment=environment(given.threads))
            with sqlite3.connect(path) as db:
                row = db.execute(
                    "SELECT documents_total, chunks, seconds_read, seconds_chunk, seconds_load, seconds_encode, "
                    "seconds_wait, seconds_write FROM reembed_runs"
                ).fetchone()
            print(
                f"| {row[0]:,} | {row[1]:,} | {done.seconds:.1f} | {' | '.join(f'{value:.2f}' for value in row[2:])} | "
                f"{done.peak_bytes / 1e6:.0f} | {done.peak_anonymous_bytes / 1e6:.0f} |",
                flush=True,
            )


def grow(path: Path, times: int) -> None:
    """Every document so many times, with new ids and a mark that makes each text its own."""
    with sqlite3.connect(path) as db:
        (last,) = db.execute(
            "SELECT max(id) FROM statute_articles"
        ).fetchone()  # copies get numbers of their own, and are not copied
        for copy in range(1, times):
            db.execute(
                f"INSERT INTO statute_articles(statute_id, article_no, text) SELECT statute_id, article_no, text || ' "
                f"{copy}' FROM statute_articles WHERE id <= {last}"
            )
            for parents, name in (("cases", "case"), ("decisions", "decision"), ("interpretations", "interpretation")):
                step = 1_000_000 * copy
                db.execute(
                    f"INSERT INTO {parents}(id, doc_id) SELECT id + {step}, doc_id || '-{copy}' FROM {parents} WHERE "
                    f"id < 1000000"
                )
                db.execute(
                    f"INSERT INTO {name}_paragraphs({name}_id, para_index, text) SELECT {name}_id + {step}, "
                    f"para_index, text || ' {copy}' FROM {name}_paragraphs WHERE {name}_id < 1000000"
                )
    db.close()


def second_run(given: argparse.Namespace) -> None:
    """Short documents: what is measured is finding out that nothing is to be done."""
    with tempfile.TemporaryDirectory() as folder:
        path = given.database or generated(Path(folder) / "law.db", given.second_run, given.model)
        command = [
            sys.executable,
            str(SCRIPT),
            "--db",
            str(path),
            "--version-id",
            "5",
            "--chunking-strategy",
            "dynamic",
            "--model",
            given.model,
        ]
        seconds = []
        for _ in range(given.rounds):
            started = time.perf_counter()
            said = subprocess.run(
                command, env=environment(given.threads), capture_output=True, text=True, check=True
            ).stdout
            seconds.append(time.perf_counter() - started)
            assert "; 0 encode calls" in said, said
    print(said + f"whole command: {median(seconds):.2f} s ({', '.join(f'{one:.2f}' for one in seconds)})")


def generated(path: Path, documents: int, model: str) -> Path:
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny_law

    from moai.reembedding.build import build
    from moai.reembedding.encoders import SentenceModel
    from moai.reembedding.options import ReembedConfig

    tiny_law.make(path, documents=2)
    with sqlite3.connect(path) as db:
        db.executemany(
            "INSERT INTO statute_articles(id, statute_id, text) VALUES(?, 1, ?)",
            [(n, tiny_law.sentence(n % 50, 2000) + f" {n}") for n in range(100, 100 + documents)],
        )
    db.close()
    found = SentenceModel.find(model, threads=1)
    build(
        ReembedConfig(db=str(path), version_id=5, chunking_strategy="dynamic"),
        model=tiny_law.HashingModel(name=found.name, revision=found.revision),
        environ={},
    )
    return path


if __name__ == "__main__":
    main()
