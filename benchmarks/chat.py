"""Conversations prepared by moai, by moai's reference tokenizer alone, and as people do: one core, whole commands.

    python benchmarks/chat.py FILES... --tokenizer_path DIR --template FILE.jinja [--megabytes 20] [--rounds 3]
                              [--baseline CHECKOUT]

FILES (JSON lines with `text`) are cut into conversations of 2 to 8 messages, a third of them with words of the system.
Every round runs each way once, on core 0, into a new folder; printed are medians of seconds and CPU seconds, and the
content digest where moai made it. `--baseline` is another checkout of moai, run with this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from statistics import median

from measure import CommandFailed, measure

HERE = Path(__file__).parent
CUT = 300
"""Characters of a message, about."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/chat"))
    given = parser.parse_args()
    work = given.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data = work / "data.jsonl"
    size = write_conversations(given.files, int(given.megabytes * 1e6), data)
    tokenizer, template = str(given.tokenizer_path.resolve()), str(given.template.resolve())

    def moai(root: Path, *more: str) -> tuple[list[str], Path]:
        words = f"-m moai prepare --dataset {data} --data_format chat --tokenizer_path {tokenizer} --num_proc 0"
        packing = f"--chat_template {template} --seq_len 4096 --packing bfd --cache_dir {work}/out"
        return [sys.executable, *words.split(), *packing.split(), *more], root

    ways = {"moai": moai(HERE.parent), "moai, the reference alone": moai(HERE.parent, "--tokenizer_backend=tokenizers")}
    if given.baseline:
        ways["baseline"] = moai(given.baseline.resolve())
    mapped = [sys.executable, str(HERE / "peers" / "chat_map.py"), str(data), f"{work}/out", tokenizer, template]
    ways["datasets.map, batched"] = (mapped, HERE.parent)
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in ways}
    os.sched_setaffinity(0, {0})
    for _ in range(given.rounds):
        for name, (command, root) in list(ways.items()):
            shutil.rmtree(work / "out", ignore_errors=True)
            environment = {
                "PYTHONPATH": str(root),
                "PYTHONSAFEPATH": "1",
                "RAYON_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            try:
                took = measure(command, environment=environment)
            except CommandFailed as error:
                print(f"{name}: {error}", file=sys.stderr)
                del ways[name]
                continue
            made = next((line.split()[-1] for line in took.output.splitlines() if line.startswith("content ")), "")
            found[name].append((took.seconds, took.cpu_seconds, made))
    first = median(cpu for _, cpu, _ in found["moai"])
    for name, runs in found.items():
        if runs:
            seconds, cpu = (median(values) for values in list(zip(*runs))[:2])
            contents = " ".join(sorted({made[:12] for *_, made in runs}))
            figures = f"{seconds:8.2f} s {cpu:8.2f} CPU s  {size / 1e6 / cpu:6.2f} MB/s  {cpu / first:5.1f} x"
            print(f"{name:28} {figures}  {contents}")
    return 0


def write_conversations(files: list[Path], size: int, target: Path) -> int:
    """Bytes of content in the conversations that are written to `target`."""
    generator, written = random.Random(0), 0
    texts = [json.loads(line)["text"] for path in files for line in path.read_bytes().splitlines()]
    generator.shuffle(texts)
    with open(target, "w", encoding="utf-8") as out:
        pieces = (text[at : at + CUT] for text in texts for at in range(0, min(len(text), 20 * CUT), CUT))
        while written < size:
            turns = generator.randrange(2, 9, 2)
            roles = [*(["system"] if generator.random() < 0.3 else []), *["user", "assistant"] * (turns // 2)]
            messages = [{"role": role, "content": piece} for role, piece in zip(roles, pieces)]
            if len(messages) < len(roles):
                break
            written += sum(len(message["content"].encode()) for message in messages)
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return written


if __name__ == "__main__":
    sys.exit(main())
