"""From text to rows under torchrun, two ranks: the guides' way, moai, and moai killed halfway.

    python benchmarks/race.py FILES... --tokenizer_path DIR [--megabytes 400] [--svg docs/race.svg] [--json FILE]
    python benchmarks/race.py --draw FILE --svg docs/race.svg

FILES (JSON lines with `text`) are repeated to the size. Five runs, one after another, each with an empty cache but the
fourth: (1) the guides' way, (2) moai, (3) moai whose rank 0 gets `kill -9` when half of its shards are there, (4) the
same command again, (5) another number of workers. The last column is the digest of what came out.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from corpus import repeat

HERE = Path(__file__).parent
ROOT = HERE.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
LIMIT_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One run. `killed_at` and `told_after` are seconds: from the start, and from the kill to the other rank's end."""

    what: str
    seconds: float
    rows: int = 0
    digest: str = ""
    reused: int = 0
    shards: int = 0
    killed_at: float = 0.0
    told_after: float = 0.0
    cause: str = ""

    def says(self) -> str:
        if self.killed_at:
            return f"kill -9 on rank 0; rank 1 ended {self.told_after:.1f} s later: {self.cause}"
        reused = f", {self.reused} of {self.shards} shards reused" if self.reused else ""
        return f"{self.seconds:.1f} s{reused}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tokenizer_path", type=Path, metavar="DIR")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--shard_bytes", default="16MB")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw an earlier race, run none")
    given = parser.parse_args()
    if given.draw:
        race = json.loads(given.draw.read_text())
        laps = [Lap(**lap) for lap in race["laps"]]
        megabytes = race["megabytes"]
    elif given.files and given.tokenizer_path:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
            laps = run(given.files, given.tokenizer_path.resolve(), given.megabytes, given.shard_bytes, Path(work))
        megabytes = given.megabytes
    else:
        parser.error("FILES and --tokenizer_path are needed, or --draw")
    for lap in laps:
        print(f"{lap.what:34} {lap.says()}  {lap.digest[:12]}")
    digests = {lap.digest for lap in laps if lap.digest}
    print(f"{len(digests)} content of moai's finished runs; guides / moai: {laps[0].seconds / laps[1].seconds:.1f}")
    if given.json:
        given.json.write_text(json.dumps({"megabytes": megabytes, "laps": [asdict(lap) for lap in laps]}, indent=1))
    if given.svg:
        given.svg.write_text(draw(laps, megabytes), encoding="utf-8")
    return int(len(digests) != 1)


def run(files: list[Path], tokenizer: Path, megabytes: int, shard_bytes: str, work: Path) -> list[Lap]:
    data = repeat(files, megabytes, work / "data.jsonl")

    def moai(cache: str, *more: str) -> list[str]:
        words = f"-m moai prepare --dataset {data} --tokenizer_path {tokenizer} --seq_len 2048 --packing wrapped"
        return [*TORCHRUN, *words.split(), "--shard_bytes", shard_bytes, "--cache_dir", str(work / cache), *more]

    guides = [*TORCHRUN, str(HERE / "peers" / "guides_ranks.py"), str(data), str(work / "guides"), str(tokenizer)]
    data.read_bytes()
    laps = [timed("the guides' way", [*guides, "2048", "2"], work, _guides_rows)]
    shutil.rmtree(work / "guides")
    laps.append(timed("moai", moai("cold"), work, _moai_rows))
    shutil.rmtree(work / "cold")
    laps.append(killed("moai, killed halfway", moai("killed"), work, laps[1].shards // 2))
    laps.append(timed("moai, the same command again", moai("killed"), work, _moai_rows))
    laps.append(timed("moai, with 5 workers", moai("five", "--num_proc", "5"), work, _moai_rows))
    return laps


def timed(what: str, command: list[str], work: Path, read: Callable[[str], dict[str, object]]) -> Lap:
    os.sync()
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=_environment(work), cwd=ROOT
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-4000:]}")
    return Lap(what=what, seconds=round(seconds, 2), **read(done.stdout + done.stderr))  # type: ignore[arg-type]


def killed(what: str, command: list[str], work: Path, shards: int) -> Lap:
    """Kill rank 0 when so many shards are committed, and see how the other one ends."""
    began = time.monotonic()
    with open(work / "log", "w+") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(work), cwd=ROOT)
        receipts = work / "killed" / "shards"
        while launcher.poll() is None and len(list(receipts.glob("**/*.arrow"))) < shards:
            time.sleep(0.01)
        ranks = {_rank(process): process for process in psutil.Process(launcher.pid).children()}
        ranks[0].send_signal(signal.SIGKILL)
        at = time.monotonic()
        ranks[1].wait(LIMIT_SECONDS)
        told = time.monotonic() - at
        launcher.wait(LIMIT_SECONDS)
        log.seek(0)
        said = log.read()
    cause = re.search(r"error: (.*)", said)
    return Lap(
        what=what,
        seconds=round(at - began, 2),
        killed_at=round(at - began, 2),
        told_after=round(told, 2),
        cause=cause[1] if cause else said[-300:],
    )


def _environment(work: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "guides")}


def _rank(process: psutil.Process) -> int:
    return int(process.environ().get("RANK", -1))


def _guides_rows(said: str) -> dict[str, object]:
    return {"rows": int(re.search(r"rank 0: ([\d,]+) rows", said)[1].replace(",", ""))}  # type: ignore[index]


def _moai_rows(said: str) -> dict[str, object]:
    rows = re.search(r"rows +([\d,]+) of", said)
    shards = re.search(r"(\d+) shards, (\d+) reused", said)
    digest = re.search(r"content +([0-9a-f]{64})", said)
    assert rows, said
    assert shards, said
    assert digest, said
    return {
        "rows": int(rows[1].replace(",", "")),
        "shards": int(shards[1]),
        "reused": int(shards[2]),
        "digest": digest[1],
    }


WIDTH, LEFT, LANE, TOP = 960, 270, 46, 56


def draw(laps: list[Lap], megabytes: int) -> str:
    """Bars of time that grow at the race's own pace, ten times faster; whoever shows no movement shows them whole."""
    longest = max(lap.seconds for lap in laps)
    per_second = (WIDTH - LEFT - 150) / longest
    height = TOP + LANE * len(laps) + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<style>text{fill:#24292f;font-size:15px}.small{fill:#57606a;font-size:12px}"
        "rect.bar{transform-origin:left;transform-box:fill-box;animation:grow linear both}"
        "@keyframes grow{from{transform:scaleX(0)}}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}}"
        "@media(prefers-reduced-motion:reduce){rect.bar{animation:none}}</style>",
        f'<text x="12" y="28">{megabytes} MB of text to rows of 2,048 tokens, torchrun with two ranks</text>',
    ]
    for number, lap in enumerate(laps):
        y = TOP + LANE * number
        color = "#8c959f" if not number else "#cf222e" if lap.killed_at else "#1a7f37"
        width = max(2.0, lap.seconds * per_second)
        seconds = lap.seconds / 10
        short = f"{lap.seconds:.1f} s" if not lap.killed_at else f"kill -9 at {lap.killed_at:.1f} s"
        below = (
            f"rank 1 ends {lap.told_after:.1f} s later and says why"
            if lap.killed_at
            else f"{lap.reused} of {lap.shards} shards reused"
            if lap.reused
            else ""
        )
        below += f"{' · ' if below else ''}digest {lap.digest[:8]}" if lap.digest else ""
        out += [
            f'<text x="12" y="{y + 17}">{html.escape(lap.what)}</text>',
            f'<rect class="bar" style="animation-duration:{seconds:.2f}s" x="{LEFT}" y="{y}" width="{width:.1f}" '
            f'height="22" rx="3" fill="{color}"/>',
            f'<text x="{LEFT + width + 8:.1f}" y="{y + 17}">{short}</text>',
            f'<text class="small" x="{LEFT}" y="{y + 37}">{html.escape(below)}</text>',
        ]
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
