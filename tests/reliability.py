"""The table of docs/reliability.md: fault, test, runs, outcome, as the long tests of a real run left them.

.venv/bin/python tests/reliability.py [pytest arguments]          # hours on two cores; exits as pytest does
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        words = [sys.executable, "-m", "pytest", "-q", "-m", "long", *sys.argv[1:]]
        code = subprocess.run(
            words, cwd=Path(__file__).parent.parent, env={**os.environ, "MOAI_RECORD": str(rows)}, stdout=sys.stderr
        ).returncode
        print("| fault | test | runs | outcome |\n|---|---|---|---|")
        for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []):
            print(
                f"| {row['fault']} | `{row['test'].removeprefix('tests/').partition('[')[0]}` | {row['runs']:,} | "
                f"{row['outcome']} |"
            )
    return code


if __name__ == "__main__":
    sys.exit(main())
