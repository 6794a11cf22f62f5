"""Ray beside processes, and a store beside the disk, on the same text: interleaved rounds, medians, ratios.

    python benchmarks/cluster.py FILES... --tokenizer_path DIR [--rounds 3] [--num_proc 2] [--failing 0.1]

Every run starts from an empty cache and says how long it worked, by its own line `Prepared ...`; what a private Ray
takes to start stands in a column of its own. `store` reads the same files from a server on loopback
(tests/s3_server.py), which shares the cores, so its CPU seconds are counted. `faults` is the same with a share of its
requests failing: 503, resets, 0.2 s late. All runs must give one content digest. One unmeasured round comes first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIAMOAITESTS", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}


def prepare(
    dataset: list[str], cache: Path, given: argparse.Namespace, *flags: str, **environ: str
) -> dict[str, float]:
    command = [sys.executable, "-m", "moai", "prepare", "--dataset", *dataset, "--cache_dir", str(cache)]
    command += ["--tokenizer_path", given.tokenizer_path, "--seq_len", "2048", "--packing", "bfd_split"]
    command += ["--shard_bytes", given.shard_bytes, "--num_proc", str(given.num_proc), *flags]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environ}
    )
    shutil.rmtree(cache)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout + ran.stderr
    begun = re.search(r"ready in ([0-9.]+) s", said)
    worked = re.search(r"Prepared [0-9,]+ documents in ([0-9.]+)s", said)
    content = re.search(r"^content +([0-9a-f]{64})", said, re.MULTILINE)
    assert worked
    assert content
    return {"seconds": float(worked[1]), "start": float(begun[1]) if begun else 0.0, "content": int(content[1], 16)}


class Store:
    """The server in a process of its own, so that its CPU seconds can be told from moai's."""

    def __init__(self, folder: Path, failing: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, str(ROOT / "tests" / "s3_server.py"), str(folder), str(self.port), str(failing)]
        self.process = psutil.Popen(command)
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.05)

    def cpu_seconds(self) -> float:
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)

    @property
    def environ(self) -> dict[str, str]:
        return {**ENVIRON, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--shard_bytes", default="4MB")
    parser.add_argument("--only", nargs="+", default=["processes", "ray", "store", "faults"])
    parser.add_argument("--failing", type=float, default=0.1)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="moai-cluster-") as name:
        work = Path(name)
        (work / "buckets" / "bkt").mkdir(parents=True)
        for file in given.files:
            shutil.copy(file, work / "buckets" / "bkt" / file.name)
        files = [str(file) for file in given.files]
        objects = [f"s3://bkt/{file.name}" for file in given.files]
        stores = {"store": Store(work / "buckets", 0.0), "faults": Store(work / "buckets", given.failing)}
        try:
            for number in range(given.rounds + 1):  # the first is not measured
                runs = {
                    "processes": lambda: prepare(files, work / "cache", given),
                    "ray": lambda: prepare(files, work / "cache", given, "--executor", "ray"),
                }
                for kind, store in stores.items():
                    runs[kind] = lambda store=store: prepare(objects, work / "cache", given, **store.environ)
                for kind, run in ((kind, run) for kind, run in runs.items() if kind in given.only):
                    before = {name: store.cpu_seconds() for name, store in stores.items()}
                    one = run()
                    one["server"] = stores[kind].cpu_seconds() - before[kind] if kind in stores else 0.0
                    print(number, kind, {key: value for key, value in one.items() if key != "content"}, flush=True)
                    if number:
                        found.setdefault(kind, []).append(one)
        finally:
            for store in stores.values():
                store.process.kill()
    assert len({one["content"] for runs in found.values() for one in runs}) == 1, "the bytes differ"
    print("\n| run | seconds, median | against processes | Ray's start, s | server's CPU, s |\n|---|---|---|---|---|")
    for kind, runs in found.items():
        ratio = statistics.median(ours["seconds"] / one["seconds"] for ours, one in zip(found["processes"], runs))
        median = {key: statistics.median(one[key] for one in runs) for key in ("seconds", "start", "server")}
        print(f"| {kind} | {median['seconds']:.1f} | {ratio:.2f} | {median['start']:.1f} | {median['server']:.1f} |")


if __name__ == "__main__":
    main()
