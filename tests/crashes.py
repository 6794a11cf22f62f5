"""A real preparation, killed at a failpoint, run again, and compared byte for byte with one that nobody disturbed.

What is killed is whoever passes the place: driver, worker, or rank 0 of a launch whose other ranks wait. The list of
places comes from a run that only counts them, so a new failpoint is exercised without writing a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 20_000
ENDS_WITHIN = 600
WAYS = {"serial": ["--num_proc", "0"], "processes": ["--num_proc", "2"], "launch": ["--num_proc", "1"]}
"""How it is run: in one process, with two workers, or by rank 0 of a launch of two with one worker."""
IN_FLIGHT = {"serial": 1, "processes": 2, "launch": 1}
JUDGING = ["--quality", "repetition", "--dedup", "minhash"]
JUDGED = {"judged": ["--num_proc", "0", *JUDGING], "judged by two": ["--num_proc", "2", *JUDGING]}
"""The same with documents that are judged, of a corpus with copies."""
SIDECARS = 3
"""Files that such a shard has beside the one of its documents, each written like a shard."""
TIMED = ("status.end", "worker.start", "worker.shard", "driver.finished")
"""How often these are passed depends on time."""


@dataclass(frozen=True)
class Ran:
    codes: list[int]
    said: str


def write_corpus(path: Path) -> Path:
    """Two files, some bad records, at least five shards."""
    path.mkdir()
    lines = [
        json.dumps({"text": f"Document {n}: the quick brown fox, 그리고 문서 {n * 7919}. " * 6}, ensure_ascii=False)
        for n in range(260)
    ]
    lines[40] = lines[120] = '{"text": 5}'
    (path / "a.jsonl").write_text("\n".join(lines[:100]) + "\n")
    (path / "b.jsonl").write_text("\n".join(lines[100:]) + "\n")
    return path


def command(data: Path, cache: Path, way: str) -> list[str]:
    flags = [
        "--dataset",
        str(data),
        "--cache_dir",
        str(cache),
        "--tokenizer_path",
        str(ROOT / "tokenizers" / "demo"),
        "--seq_len",
        "128",
        "--packing",
        "bfd_split",
        "--shard_bytes",
        str(SHARD_BYTES),
        "--max_bad_ratio",
        "0.1",
        *{**WAYS, **JUDGED}[way],
    ]
    return [sys.executable, "-m", "moai", "prepare", *flags]


def run(data: Path, cache: Path, way: str, points: Path | None = None, wanted: str = "", **more: str) -> Ran:
    """One run to its end, with the failpoints' directory `points`, where `wanted` is armed."""
    env = {**os.environ, "MOAI_LAUNCH_ID": os.urandom(8).hex(), **more}
    if points:
        points.mkdir(exist_ok=True)
        env |= {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": wanted}
    world = 2 if way == "launch" else 1
    ranks = []
    for rank in range(world):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        ranks.append(
            subprocess.Popen(
                command(data, cache, way),
                cwd=ROOT,
                env={**env, **where},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=ENDS_WITHIN)[0] for rank in ranks]
    return Ran([rank.returncode for rank in ranks], "".join(said))


def places(points: Path) -> Counter[str]:
    """Names of failpoints that were passed, and how often."""
    return Counter(
        {
            name: max(int(path.suffix[1:]) for path in points.glob(f"{name}.*"))
            for name in {path.stem for path in points.iterdir()}
        }
    )


def content(cache: Path) -> dict[str, str]:
    """Every byte of what was published, but for `run` of the manifest, which tells of this run."""
    [made] = [path for path in (cache / "datasets").iterdir() if "." not in path.name]
    manifest = json.loads((made / "manifest.json").read_bytes())
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in made.iterdir()
        if path.name != "manifest.json"
    }
    return {**files, "manifest.json": json.dumps(manifest["content"], sort_keys=True), "": made.name}


@dataclass(frozen=True)
class Outcome:
    killed: bool
    """Somebody was; a place that is passed by chance may not have been reached."""
    again: bool
    """It took a second run."""
    redone: int
    """Shards begun beyond those there are."""


def crash(data: Path, folder: Path, way: str, wanted: str, undisturbed: dict[str, str], shards: int) -> Outcome:
    """Run with `wanted` armed, and again if that failed. Raises AssertionError unless all is as in the undisturbed
    run.
    """
    cache, points = folder / "cache", folder / "points"
    first = run(data, cache, way, points, wanted)
    name, _, number = wanted.partition("=")[0].partition(":")
    killed = (points / f"{name}.{number}").exists()
    again = any(first.codes)
    if again:
        assert killed, first.said
        assert "Traceback" not in first.said or "=raise" in wanted, first.said
        assert all(code in (-signal.SIGKILL, 1, 70, 74, 75) for code in first.codes), (first.codes, first.said)
        second = run(data, cache, way, points)
        assert not any(second.codes), second.said
    assert content(cache) == undisturbed, wanted
    assert not [path for path in (cache / "attempts").iterdir() if not again], "a run that went well leaves no attempt"
    redone = places(points)["shard.begin"] - shards
    most = IN_FLIGHT[way] + 1 if way in WAYS else (SIDECARS + 1) * 3
    assert 0 <= redone <= most, f"{wanted}: {redone} shards were begun again"
    return Outcome(killed, again, redone)
