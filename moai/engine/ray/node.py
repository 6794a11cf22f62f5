"""One node of a private Ray, as a process: `python -m moai.engine.ray.node FOLDER`, its wishes as JSON in the first
line of stdin.

It prints the cluster's address and lives until stdin ends: when its parent wishes so, or is gone, however that came
about. Then all of it ends at once, since what a node holds is worth nothing; the guard, which shares nothing with it
but a pipe, sees to that also where this process is killed.

`ray start` would put the interface's address in place of loopback's, and start two servers that nobody asked for: one
for clients, one for the dashboard. So the node is made by the class that `ray start` makes it by.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

_LOOK_SECONDS = 0.5


def main() -> None:
    _guard()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wishes: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Bare(Node):  # type: ignore[misc]
        def start_api_server(self, **_: Any) -> None:
            """The dashboard's, which would run without a dashboard too."""

    params = RayParams(
        gcs_address=wishes["address"],
        node_ip_address=wishes["ip"],
        num_cpus=wishes["num_cpus"],
        num_gpus=0,
        object_store_memory=wishes["object_store_bytes"],
        temp_dir=wishes["folder"],
        include_log_monitor=False,
        no_monitor=True,
        dashboard_agent_listen_port=0,
    )
    # Ray's own processes are tied to this one by the kernel (spawn_reaper).
    node = Bare(params, head=wishes["address"] is None, shutdown_at_exit=False, spawn_reaper=True)
    print(json.dumps({"address": node.gcs_address}), flush=True)
    while not node.dead_processes():
        time.sleep(_LOOK_SECONDS)
    _end()


def _guard() -> None:
    """A process in a session of its own that ends this one's group, and removes its folder, once this one is gone: of
    what Ray starts, its agents would outlive it by a minute.
    """
    group, (reading, writing) = os.getpgrp(), os.pipe()
    if os.fork():
        os.close(reading)
        return
    os.setsid()
    for descriptor in (0, 1, 2, writing):
        os.close(descriptor)
    os.read(reading, 1)
    try:
        os.killpg(group, signal.SIGKILL)
    finally:
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        os._exit(0)


def _end_with_stdin() -> None:
    while os.read(0, 1 << 10):
        pass
    _end()


def _end() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
