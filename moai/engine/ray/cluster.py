"""The Ray cluster of a run: the one that RAY_ADDRESS names, or a private one that begins and ends with the work.

    with Cluster(here=here, environ=environ, report=report, shared=folder) as cluster:
        executor = Ray(cluster=cluster, ...)              # nothing is started before there is work

A private one is a process on this machine (`moai.engine.ray.node`); in a launch of several nodes their local ranks 0
join it while they wait (`Joining`), told where by the launch's status file. It knows its own by a token, listens on
loopback or the launch's interface, and keeps its files under a temporary directory. Whatever is killed, nothing of it
stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from moai.core import resources
from moai.core.distributed import JOIN, Ranks, Report
from moai.core.errors import ConfigError, WorkerDied

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 100 << 20
"""Ray's least is 75 MB. What goes through it are pipelines, a few MB once a run."""
_START_SECONDS = 120.0
_LOOK_SECONDS = 5.0
_GONE_SECONDS = 20.0
_LONGEST_TEMPORARY = 40
"""Bytes: Ray keeps sockets in it, whose paths have 107 at most, some 65 of them Ray's."""
_LOOPBACK, _ELSEWHERE = "127.0.0.1", "10.254.254.254"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_enable_metrics_collection": "0",
}
"""Of a private node. It sends nothing home; memory is looked after by moai; without its head it ends in 10 s."""

_DRIVER = {"RAY_gcs_rpc_server_reconnect_timeout_s": "60"}
"""Of this process, which Ray would end before it could say why its head is gone."""


@dataclass
class Cluster:
    """Connected on first use. `here` and `environ` are the launch's; `report` tells its other nodes where to join."""

    shared: Path
    """A folder that all nodes see."""
    here: Ranks = field(default_factory=Ranks)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    report: Report = lambda _: None
    _node: Node | None = None
    _address: str = ""
    _connected: bool = False
    _ours: bool = False
    """The connection, not the cluster."""
    _looked_at: float = 0.0
    _answered_at: float = 0.0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def connect(self) -> None:
        """Raises ConfigError where Ray is not installed or nobody answers at RAY_ADDRESS, WorkerDied where a private
        one does not start.
        """
        if self._connected:
            return
        check_installed()
        started = time.monotonic()
        if not _is_initialized():  # where the program has connected by itself, that is its cluster
            address = self.environ.get("RAY_ADDRESS", "")
            if address:
                _check_address(address)
            else:
                self._begin_private()
            try:
                _init(self._address or address)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {error}") from error
            self._ours = True
        self._connected = True
        import ray

        self._address = ray.get_runtime_context().gcs_address
        self._answered_at = time.monotonic()
        seconds = time.monotonic() - started
        what = "A private Ray" if self._node else f"Ray at {self._address}"
        logger.info("%s: %d CPUs on %d nodes, ready in %.1f s", what, self.cpus(), len(self._nodes()), seconds)

    def cpus(self) -> int:
        """Of all nodes that are there now."""
        return max(1, int(sum(node["Resources"].get("CPU", 0) for node in self._nodes())))

    def check(self) -> None:
        """Raises WorkerDied once the cluster is gone. Ray itself would wait for it, and end this process after a
        minute.
        """
        if self._node and self._node.process.poll() is not None:
            raise WorkerDied("the private Ray ended while it worked; finished shards are kept, run again to go on")
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        if _answers(self._address):
            self._answered_at = time.monotonic()
        elif now - self._answered_at > _GONE_SECONDS:
            raise WorkerDied(
                f"the Ray cluster at {self._address} has not answered for {_GONE_SECONDS:.0f} s; finished shards are "
                f"kept, run again to go on"
            )

    def close(self) -> None:
        """A private one ends; of any other this process takes leave."""
        if self._ours:
            import ray

            with _signals_kept(), contextlib.suppress(Exception):
                ray.shutdown()
        if self._node:
            self._node.end()
            self.report({JOIN: None})
        self._node, self._connected, self._ours = None, False, False

    def _nodes(self) -> list[dict[str, Any]]:
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def _begin_private(self) -> None:
        ip = _interface(self.environ) if self.here.nodes > 1 else _LOOPBACK
        self._node = Node.begin(ip=ip, address=None, token=_token(), environ=self.environ)
        self._address = self._node.ready()
        os.environ.update(_keys(_token()) | _DRIVER)
        if self.here.nodes > 1:
            self.shared.mkdir(parents=True, exist_ok=True)
            secret = self.shared / f"ray-{secrets.token_hex(8)}.token"
            with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(_token())
            self._node.token_file = secret
            self.report({"line": "starting", JOIN: {"address": self._address, "token_file": str(secret)}})


@dataclass
class Joining:
    """This node's part in the private Ray of its launch, while its rank waits."""

    environ: Mapping[str, str]
    node: Node | None = None
    _joined: str = ""

    def __enter__(self) -> Joining:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.node:
            self.node.end()
        self.node = None

    def heed(self, progress: Mapping[str, Any]) -> None:
        """Join where a look at the status file says so; leave where it no longer does."""
        offer = progress.get(JOIN) or {}
        address = str(offer.get("address", ""))
        if address == self._joined:
            return
        self.__exit__()
        self._joined = address
        if not address:
            return
        try:
            token = Path(offer["token_file"]).read_text()
            self.node = Node.begin(ip=_towards(address), address=address, token=token, environ=self.environ)
        except OSError as error:
            logger.warning("This node does not help to prepare: %s", error)
        else:  # whoever waits shall hear at once how preparation ends
            threading.Thread(target=_await, args=(self.node, address), name="joins", daemon=True).start()


def _await(node: Node, address: str) -> None:
    try:
        node.ready()
    except WorkerDied as error:
        if not node.ended:
            logger.warning("This node does not help to prepare: %s", error)
    else:
        logger.info("This node helps to prepare, in the private Ray at %s", address)


@dataclass
class Node:
    """A process that holds one node."""

    process: subprocess.Popen[str]
    folder: Path
    token_file: Path | None = None
    ended: bool = False

    @classmethod
    def begin(cls, *, ip: str, address: str | None, token: str, environ: Mapping[str, str]) -> Node:
        """A head where there is no address."""
        folder = Path(tempfile.mkdtemp(prefix="moai-ray-", dir=_short_temporary_directory()))
        wishes = {
            "ip": ip,
            "address": address,
            "num_cpus": resources.detect(folder, environ=environ).cpus.value,
            "object_store_bytes": _OBJECT_STORE_BYTES,
            "folder": str(folder),
        }
        command = [sys.executable, "-m", "moai.engine.ray.node", str(folder)]
        path = os.pathsep.join(place for place in sys.path if place)
        with open(folder / "said", "w") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
                env={**environ, "PYTHONPATH": path, **_QUIET, **_keys(token)},
            )
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(wishes) + "\n")
            process.stdin.flush()
        return cls(process, folder)

    def ready(self) -> str:
        """The address of its cluster, once it is up. Raises WorkerDied with the last of what Ray said."""
        assert self.process.stdout
        watch = threading.Timer(_START_SECONDS, self.process.kill)
        watch.daemon = True
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            said = [] if self.ended else (self.folder / "said").read_text(errors="replace").strip().splitlines()
            raise WorkerDied(f"Ray did not start on this node: {' '.join(said[-1:])[:300] or 'it said nothing'}")
        return str(json.loads(line)["address"])

    def end(self) -> None:
        """With all of its processes."""
        self.ended = True
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            for process in below:  # Ray's workers have groups of their own, and take a moment to notice
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        if self.token_file:
            self.token_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def check_installed() -> None:
    """Raises ConfigError with the way to get it."""
    if find_spec("ray") is None:
        raise ConfigError("--executor ray: Ray is not installed; pip install 'moai[ray]'")


def _init(address: str) -> None:
    import ray
    from ray._private import ray_constants, worker

    # What Ray tells of lost processes goes to the standard output of whoever is connected; moai says it in its own way.
    worker.print_to_stdstream = lambda said, **_: logger.debug("Ray: %s", said)
    # Ray puts the interface's address in place of loopback's, where a cluster on loopback does not listen.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = not address.startswith(_LOOPBACK)
    try:
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _is_initialized() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def _check_address(address: str) -> None:
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Client cannot run this; start on a node of the cluster (ray job submit), or "
            f"name host:port of its head"
        )
    if address and address not in ("auto", "local") and not _answers(address):
        raise ConfigError(
            f"RAY_ADDRESS={address}: nobody answers there within {_LOOK_SECONDS:.0f} s; name host:port of a running "
            f"head, or unset it for a private Ray"
        )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_SECONDS).close()
        return True
    except (OSError, ValueError):
        return False


def _interface(environ: Mapping[str, str]) -> str:
    """The address of this node at which the launch's other nodes reach it: that of MASTER_ADDR, which is node 0's."""
    master = environ.get("MASTER_ADDR", "")
    try:
        found = socket.gethostbyname(master) if master else ""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((found, 0))  # it is one of this machine's
        return found
    except OSError:
        with contextlib.suppress(OSError):
            return _towards(f"{master or _ELSEWHERE}:1")
        return _towards(f"{_ELSEWHERE}:1")


def _towards(address: str) -> str:
    """The address of this node on the way there. Nothing is sent."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


@cache
def _token() -> str:
    """Of this process: Ray reads it once."""
    return secrets.token_hex(32)


def _keys(token: str) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _short_temporary_directory() -> str:
    found = tempfile.gettempdir()
    return found if len(os.fsencode(found)) <= _LONGEST_TEMPORARY else "/tmp"


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
