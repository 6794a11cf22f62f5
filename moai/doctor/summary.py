"""The rating the guides print, out of five, and the time that the measured speed stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moai.doctor.check import ADVICE, FAILED, OK, Check

EXAMPLE_BYTES = 4000
"""An example of the guides' 7.5 M (a coding question with its answer), an estimate."""
GUIDE_EXAMPLES = 7_500_000
_SCALE = ((20_000, "very fast"), (10_000, "fast"), (5_000, "normal"), (0, "slow"))
_FAST_WRITE_MB_PER_SECOND = 200
"""Between what a hard disk (up to about 250) and an SSD (500 and more) write; the guides gave a point for an SSD."""


def summarize(checks: Sequence[Check]) -> list[str]:
    """Score, speed where it was measured, and the count of verdicts."""
    by_name = {check.name: check for check in checks}
    memory, disk = by_name["memory"].figures, by_name.get("disk speed")
    points = {
        "tokenizer": float(by_name["tokenizer"].verdict == OK),
        "cores": 1.0 if by_name["cores"].figures["cpus"] >= 32 else 0.5,
        "RAM": {"memory": 1.0, "balanced": 0.5, "disk": 0.0}[memory["memory_mode"]],
        "disk": 0.0,
        "environment": float(all(check.verdict == OK for check in checks if "recommended" in check.figures)),
    }
    if disk and disk.verdict != FAILED:
        points["disk"] = 1.0 if disk.figures["write_mb_per_second"] >= _FAST_WRITE_MB_PER_SECOND else 0.5
    total = sum(points.values())
    word = "excellent" if total >= 4.5 else "good" if total >= 3 else "could be better"
    count = Counter(check.verdict for check in checks)
    speed = by_name.get("tokenizer speed")
    return [
        f"Score: {total:g} of 5, {word} ({', '.join(f'{name} {value:g}' for name, value in points.items())})",
        *(_speed_lines(memory["num_proc"], speed.figures["mb_per_second"]) if speed else ()),
        f"{len(checks)} checks: {count[OK]} ok, {count[ADVICE]} with advice, {count[FAILED]} failed",
    ]


def _speed_lines(workers: int, mb_per_second: float) -> list[str]:
    examples = workers * mb_per_second * 1e6 / EXAMPLE_BYTES
    word = next(word for least, word in _SCALE if examples >= least)
    minutes = GUIDE_EXAMPLES / max(1.0, examples) / 60
    return [
        f"Speed: num_proc {workers} x {mb_per_second:.2f} MB/s = {workers * mb_per_second:.1f} MB/s at best, "
        f"{examples:,.0f} examples/s of 4 KB: {word}",
        f"       (20,000+ very fast, 10,000+ fast, 5,000+ normal); 7.5 M of them would take {minutes:,.0f} min to "
        f"tokenize here",
    ]
