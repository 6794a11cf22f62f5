"""Ranks without torch, and the wait without a collective: one rank prepares, the others watch its status file.

    result = build_once(prepare, ranks=ranks(os.environ), cache=cache, scope="auto", stall_timeout=600.0)

The preparer rewrites `<cache>/launches/<launch-id>.json` every two seconds: state, progress, and on failure the cause.
The others open that file, write nothing, and end as soon as it says ready or failed, or its writer is gone: at once
where they can ask for its pid, otherwise when its heartbeat has not moved for 30 s on their own clock. No process group
exists yet, no file time is compared, and no lock is needed for any of it. The launch id changes with every launch, so
that a file of an earlier one is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError, Interrupted, MoaiError, PreparationFailed
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, storage_errors, write_atomic
from moai.core.fsops import names_in, read_regular
from moai.core.stopping import Stop, stoppable

logger = logging.getLogger(__name__)

LAUNCHES = "launches"
"""The cache's folder of status files."""
HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 30.0
"""A heartbeat that stands still this long, on the waiter's clock, is that of a dead host or process."""
FIRST_SIGN_SECONDS = 120.0
"""How long a status file may be missing: shared file systems remember absence for up to a minute."""
_POLL_FIRST, _POLL_LONGEST = 0.1, 1.0
_SAY_SECONDS = 15.0
_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "ceph",
    "beegfs",
    "glusterfs",
    "cifs",
    "smb",
    "afs",
    "9p",
    "virtiofs",
    "fuse.",
    "wekafs",
    "panfs",
)

_MOST_BYTES = 1 << 20
_KEYS = {"state", "pid", "start_token", "host", "boot_id", "beat", "progress"}

Report = Callable[[dict[str, Any]], None]
JOIN = "join"
"""In what is reported: where waiting ranks may join in. It stays until it is reported otherwise."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the launch, as torchrun, accelerate, Slurm or nothing set it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)


def ranks(environ: Mapping[str, str]) -> Ranks:
    """Raises ConfigError when the variables contradict one another."""

    def number(name: str, default: int) -> int:
        try:
            return int(environ.get(name) or default)
        except ValueError:
            raise ConfigError(f"{name}={environ[name]!r}: the launcher's variable is not a number") from None

    world_size = number("WORLD_SIZE", 1)
    rank, local_rank = number("RANK", 0), number("LOCAL_RANK", number("RANK", 0) if world_size == 1 else 0)
    local_world_size = number("LOCAL_WORLD_SIZE", world_size)
    if not 0 <= rank < world_size or not 0 < local_world_size <= world_size:
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_WORLD_SIZE={local_world_size} do not fit together; start "
            f"through torchrun or accelerate launch"
        )
    return Ranks(rank, local_rank, world_size, local_world_size)


def cache_scope(cache: Path, wanted: str, mounts: Path = Path("/proc/mounts")) -> str:
    """ "shared" or "node": by request, or by the type of the file system that holds `cache`."""
    if wanted != "auto":
        return wanted
    place = str(next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists()).resolve())
    kind, best = "", -1
    try:
        for line in mounts.read_text().splitlines():
            _, mount, file_system, *_ = line.split()
            mount = mount.replace("\\040", " ")
            if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) > best:
                kind, best = file_system, len(mount)
    except OSError:
        return "shared"
    return "shared" if kind.startswith(_NETWORK_FILE_SYSTEMS) else "node"


def build_once(
    prepare: Callable[[Report], dict[str, Any]],
    *,
    ranks: Ranks,
    cache: Path,
    scope: str,
    stall_timeout: float,
    environ: Mapping[str, str],
    heed: Callable[[Mapping[str, Any]], None] = lambda progress: None,
    what: str = "",
) -> dict[str, Any]:
    """Run `prepare` in one process and give its result, a JSON object, to all of them.

    `prepare` gets a function to report progress with: a dict whose "line" is shown by the waiting ranks. It runs in
    rank 0, or in local rank 0 of every node when the cache is the node's own. Where a rank waits, `heed` hears of it
    at every look, and shall not take long. `what` tells two builds of one launch apart.
    Raises what `prepare` raised, in its process; PreparationFailed with that cause in every other; Interrupted on
    SIGINT, SIGTERM and SIGHUP.
    """
    shared = cache_scope(cache, scope) == "shared" or ranks.nodes == 1
    launch = launch_id(ranks, shared=shared, environ=environ) + what
    with stoppable("finished shards are kept, run again to go on from them", within_seconds=4):
        if (ranks.rank if shared else ranks.local_rank) == 0:
            return _prepare(prepare, Status.open(cache, launch), ranks)
        return _wait(cache, launch, ranks, stall_timeout, heed)


def launch_id(ranks: Ranks, *, shared: bool, environ: Mapping[str, str]) -> str:
    """One name for all processes of this launch, which no earlier or later launch has."""
    if environ.get("MOAI_LAUNCH_ID"):
        parts = [environ["MOAI_LAUNCH_ID"]]
    elif ranks.world_size == 1:
        parts = [uuid.uuid4().hex]
    elif ranks.nodes == 1 or not shared:
        # Ranks of one node have one parent: the launcher's agent. Its pid alone would come again, its start time will
        # not.
        parts = [socket.gethostname(), _boot_id(), str(os.getppid()), start_token(os.getppid()) or ""]
    else:
        parts = [_nonce_from_agent(ranks, environ)]
    parts += [environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


class Status:
    """The preparer's status file: rewritten as a whole, by a thread, so that it also beats while the main thread
    works.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._content: dict[str, Any] = {"state": "preparing", **owner(), "beat": 0, "progress": {}}
        self._write()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, cache: Path, launch: str) -> Status:
        """In the cache, or in the node's temporary directory where the cache is read-only."""
        error: OSError | None = None
        for folder in status_folders(cache):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return cls(folder / f"{launch}.json")
            except OSError as problem:
                error = problem
        raise MoaiError(
            f"{cache}: no place for the status file, neither there nor in {tempfile.gettempdir()} ({error})"
        )

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """For a file that nobody waits for a last word in."""
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()

    def report(self, progress: dict[str, Any]) -> None:
        with self._lock:
            offered = {name: value for name, value in self._content["progress"].items() if name == JOIN}
            self._content["progress"] = offered | progress

    def end(self, state: str, **more: Any) -> None:
        """The last word; the thread stops."""
        failpoint("status.end", self.path)
        self._ended.set()
        with self._lock:
            self._content.update(state=state, **more)
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # A full disk must not end the heartbeat: the main thread will report it in better words.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._content["beat"] += 1
            write_atomic(self.path, canonical_json(self._content), durable=False)


def status_folders(cache: Path) -> tuple[Path, Path]:
    return cache / LAUNCHES, Path(tempfile.gettempdir()) / f"moai-{os.getuid()}" / LAUNCHES


def owner() -> dict[str, Any]:
    """Who this process is, so that another one can tell whether it still runs."""
    return {
        "pid": os.getpid(),
        "start_token": start_token(os.getpid()),
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid_namespace": pid_namespace(),
    }


def is_gone(who: Mapping[str, Any]) -> bool:
    """True when an `owner` ran on this host and runs no more: the same pid with the same start is what counts, and a
    zombie does not. False also for one on another host or in another container, of whom nothing can be known."""
    here = who["host"] == socket.gethostname() and who.get("pid_namespace", "") == pid_namespace()
    return here and (
        who["boot_id"] != _boot_id() or who["start_token"] is None or start_token(who["pid"]) != who["start_token"]
    )


def pid_namespace() -> str:
    """A pid means something only within it: containers may share the name of their host."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_token(pid: int) -> str | None:
    """When a process started, in the kernel's own ticks; None if it is gone or only waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _start_token_elsewhere(pid)
    return None if fields[0] in "ZX" else fields[19]


def _prepare(prepare: Callable[[Report], dict[str, Any]], status: Status, ranks: Ranks) -> dict[str, Any]:
    try:
        result = prepare(status.report)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        kind = Interrupted.__name__ if isinstance(error, Stop) else type(error).__name__
        tail = (
            ""
            if isinstance(error, MoaiError | KeyboardInterrupt)
            else "".join(traceback.format_exception(error))[-4000:]
        )
        with contextlib.suppress(OSError):  # a full disk: then the end of this process is what the others notice
            status.end(
                "interrupted" if interrupted else "failed",
                error={"type": kind, "message": str(error), "traceback": tail, "rank": ranks.rank},
            )
        raise
    with storage_errors(status.path):
        status.end("ready", result=result)
    return result


def _wait(
    cache: Path, launch: str, ranks: Ranks, stall_timeout: float, heed: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    logger.info("[Rank %d] Waiting for rank 0 to complete all processing...", ranks.rank)
    watch = _Watch(cache, launch, ranks, stall_timeout, heed)
    pause = _POLL_FIRST
    parent = os.getppid()
    try:
        while True:
            if (result := watch.look()) is not None:
                return result
            if os.getppid() != parent:
                raise PreparationFailed(f"rank {ranks.rank} stopped waiting: its launcher (pid {parent}) is gone")
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_LONGEST)
    except Stop:
        # A launcher stops the rest when one rank ends: the reason is the preparer's, if it has left one.
        with contextlib.suppress(OSError):
            watch.look()
        raise


class _Watch:
    """What a waiting rank knows of the preparer, judged on its own clock."""

    def __init__(
        self,
        cache: Path,
        launch: str,
        ranks: Ranks,
        stall_timeout: float,
        heed: Callable[[Mapping[str, Any]], None] = lambda progress: None,
    ) -> None:
        self.paths = [folder / f"{launch}.json" for folder in status_folders(cache)]
        self.ranks, self.stall_timeout, self.heed = ranks, stall_timeout, heed
        now = time.monotonic()
        self.started, self.beat_at, self.moved_at, self.said_at = now, now, now, now
        self.beat, self.progress = -1, ""

    def look(self) -> dict[str, Any] | None:
        """The result, or None while preparation goes on. Raises PreparationFailed."""
        status = self._read()
        now = time.monotonic()
        if status is None:
            if now - self.started > min(self.stall_timeout, FIRST_SIGN_SECONDS):
                raise PreparationFailed(
                    f"rank {self.ranks.rank} saw no sign of rank 0 in {now - self.started:.0f} s ({self.paths[0]} is "
                    f"not there); did it start, and does it use this --cache_dir?"
                )
            return None
        if status["state"] == "ready":
            return dict(status["result"])
        if status["state"] in ("failed", "interrupted"):
            raise _failure(status)
        self._check_alive(status, now)
        self._check_progress(status, now)
        self.heed(status["progress"])
        return None

    def _read(self) -> dict[str, Any] | None:
        """Opened anew each time: on network file systems an open asks the server, a stat may not."""
        for path in self.paths:
            try:
                status = json.loads(read_regular(path, _MOST_BYTES))
            except (OSError, ValueError):
                with contextlib.suppress(OSError):
                    names_in(path.parent)  # lets an NFS client forget that the name was absent
                continue
            if isinstance(status, dict) and status.keys() >= _KEYS:
                return status
        return None

    def _check_alive(self, status: dict[str, Any], now: float) -> None:
        if status["beat"] != self.beat:
            self.beat, self.beat_at = status["beat"], now
        if is_gone(status):
            last = self._read()  # its last word may have come between the two looks
            if last and last["state"] != "preparing":
                return
            raise PreparationFailed(
                f"rank 0 (pid {status['pid']}) died while it prepared the data, without a word: killed, perhaps for "
                f"memory{_reached(status)}; finished shards are kept, run again to go on"
            )
        if now - self.beat_at > DEAD_SECONDS:
            raise PreparationFailed(
                f"rank 0 (pid {status['pid']} on {status['host']}) gave no heartbeat for {DEAD_SECONDS:.0f} s: it or "
                f"its host is gone{_reached(status)}; finished shards are kept, run again to go on"
            )

    def _check_progress(self, status: dict[str, Any], now: float) -> None:
        line = str(status["progress"].get("line", "starting"))
        progress = json.dumps(status["progress"].get("counter", line))
        if progress != self.progress:
            self.progress, self.moved_at = progress, now
        if now - self.moved_at > self.stall_timeout:
            raise PreparationFailed(
                f"rank 0 (pid {status['pid']}) has made no progress for {self.stall_timeout:.0f} s{_reached(status)}; "
                f"raise --stall_timeout if a step can take this long"
            )
        if now - self.said_at > _SAY_SECONDS:
            self.said_at = now
            logger.info("[Rank %d] Waiting for rank 0: %s", self.ranks.rank, line)


def _failure(status: dict[str, Any]) -> PreparationFailed:
    error = status["error"]
    verb = "was interrupted" if status["state"] == "interrupted" else "failed"
    tail = f"\n{error['traceback']}" if error["traceback"] else ""
    return PreparationFailed(
        f"rank {error['rank']} {verb} while it prepared the data: {error['type']}: {error['message']}{tail}"
    )


def _reached(status: dict[str, Any]) -> str:
    line = status["progress"].get("line")
    return f" (last heard: {line})" if line else ""


def _nonce_from_agent(ranks: Ranks, environ: Mapping[str, str]) -> str:
    """Several nodes, one cache: rank 0 publishes a fresh name through the store of the launcher's agent."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigError(
            "several nodes share the cache, and no torchrun agent is there to give the launch a name: set "
            "MOAI_LAUNCH_ID to one fresh value on all nodes"
        )
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = PrefixStore(
        f"moai/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        TCPStore(address, port, is_master=False, wait_for_workers=False),
    )
    if ranks.rank == 0 and not store.check(["launch"]):  # a second build goes by the same name
        store.set("launch", uuid.uuid4().hex)
    store.wait(["launch"], timedelta(seconds=FIRST_SIGN_SECONDS))
    return str(store.get("launch").decode())


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_token_elsewhere(pid: int) -> str | None:
    """Without /proc (macOS)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None
