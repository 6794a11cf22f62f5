"""A launcher without an agent: starts the ranks, waits for all of them, restarts and signals nobody.

    python launch.py WORLD_SIZE READ_ONLY_FOLDER|- COMMAND...

Ranks from 1 on see READ_ONLY_FOLDER mounted read-only. Output of rank N goes to the file rankN in the working
directory; exit codes are printed.
"""

from __future__ import annotations

import os
import subprocess
import sys

world_size, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
READ_ONLY = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"',
    folder,
]
ranks = []
for rank in range(world_size):
    where = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    with open(f"rank{rank}", "w") as out:
        prefix = READ_ONLY if rank and folder != "-" else []
        ranks.append(
            subprocess.Popen([*prefix, *command], env={**os.environ, **where}, stdout=out, stderr=subprocess.STDOUT)
        )
print(" ".join(str(process.wait()) for process in ranks))
