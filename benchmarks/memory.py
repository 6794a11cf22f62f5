"""Peak memory against input size: the process tree of `moai prepare`, and of the usual `datasets` pipeline beside it.

    python benchmarks/memory.py FILES... [--megabytes 125 250 500 1000] [--peer_megabytes 125] [--num_proc 2]

FILES are repeated (each copy with a number in its records, so that no two shards are equal) until the size is reached. Memory is
the proportional set size summed over the tree, sampled 20 times a second; wall-clock seconds come with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PEER = """
import sys
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
if __name__ == "__main__":
    data, out, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[4])
    rows = load_dataset("json", data_files=data, split="train", cache_dir=out + "/cache")
    rows = rows.filter(lambda batch: [len(text.strip()) > 0 for text in batch["text"]], batched=True, num_proc=processes)
    def encode(batch):
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"], return_attention_mask=False)["input_ids"]]}
    def group(batch):
        ids = [i for row in batch["input_ids"] for i in row]
        return {"input_ids": [ids[at : at + 2048] for at in range(0, len(ids), 2048)]}
    rows = rows.map(encode, batched=True, batch_size=10000, writer_batch_size=50000, num_proc=processes, remove_columns=rows.column_names)
    rows = rows.map(group, batched=True, batch_size=10000, writer_batch_size=50000, num_proc=processes)
    rows.save_to_disk(out + "/saved", num_proc=processes)
"""


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
            command = [sys.executable, "-m", "moai", "prepare", "--dataset", str(data), "--tokenizer_path", given.tokenizer_path, "--packing", "wrapped",
                       "--cache_dir", f"{folder}/cache-{megabytes}", "--num_proc", str(given.num_proc)]  # fmt: skip
            seconds, peak = measure(command)
            first = first or peak
            print(f"| moai prepare | {megabytes} | {seconds:.1f} | {peak:.0f} | {peak / first:.2f} |", flush=True)
        script = Path(folder) / "peer.py"
        script.write_text(PEER)
        for megabytes in given.peer_megabytes:
            data = repeat(given.files, megabytes, Path(folder) / "data.jsonl")
            seconds, peak = measure([sys.executable, str(script), str(data), f"{folder}/peer-{megabytes}", str(given.num_proc), given.tokenizer_path])
            print(f"| datasets: filter, map, group, save_to_disk | {megabytes} | {seconds:.1f} | {peak:.0f} | {peak / first:.2f} |", flush=True)
    return 0


def repeat(files: list[Path], megabytes: int, target: Path) -> Path:
    """`megabytes` of the files' lines, each copy numbered."""
    left, copy = megabytes * 10**6, 0
    with open(target, "wb") as out:
        while left > 0:
            for path in files:
                with open(path, "rb") as lines:
                    for line in lines:
                        if left <= 0:
                            break
                        line = line.replace(b"{", b'{"copy":%d,' % copy, 1)
                        left -= out.write(line)
            copy += 1
    return target


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak megabytes) of a command and all its descendants."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    ) as running:
        root = psutil.Process(running.pid)
        while running.poll() is None:
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss
            peak = max(peak, total)
            time.sleep(0.05)
    if running.returncode:
        sys.exit(f"failed with {running.returncode}: {' '.join(command)}")
    return time.perf_counter() - started, peak / 10**6


if __name__ == "__main__":
    sys.exit(main())
