"""What this machine lets this process use, and the plan that follows: workers, threads, bytes.

`os.cpu_count()` and psutil show the host. A container, a batch queue or a neighbour may leave far less, and a plan made
for the host ends in throttling or in the OOM killer. So the limits are read where the kernel keeps them (affinity,
cgroup v1 and v2 along the whole path, Slurm), and every value carries the limit that decided it.

    machine = detect(cache_dir)
    chosen = plan(machine, num_proc=None, num_proc_origin="default", local_world_size=8, ranks_wait=False,
                  memory_mode="auto", shard_bytes=16_000_000, batch_size=1000, environ=os.environ)
    chosen.num_proc                             # Setting(12, "96 CPUs (cgroup v2) / 8 ranks")

`python -m moai.core.resources --exports` prints the same as `export` lines, for optimize_env.sh. Only the standard
library is imported, so that this runs before anything is installed. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from moai.core.config import Setting

GB = 10**9
MEMORY_MODES = ("memory", "balanced", "disk")
FALSE_WORDS = ("", "off", "false", "f", "no", "n", "0")
"""What the tokenizers crate reads as no in TOKENIZERS_PARALLELISM."""

_BATCH_BYTES = {"memory": 8 * 2**20, "balanced": 4 * 2**20, "disk": 1 * 2**20}
_MEMORY_PARTS = {"memory": 2, "balanced": 2, "disk": 4}
"""Automatic workers share one part in so many of the available memory: the rest is the page cache's, which keeps Arrow
fast.
"""
_MODE_LINES = {
    "memory": "✅ Sufficient RAM ({gb}GB available), using in-memory processing",
    "balanced": "✅ Moderate RAM ({gb}GB available), using balanced processing",
    "disk": "⚠️ Limited RAM ({gb}GB available), using disk-based processing",
}
UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as the largest page-aligned integer; no machine has 2**60 bytes."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this process may use here; each reason names the limit that decided."""

    cpus: Setting
    """CPUs; the reason is one of all cores, affinity, cgroup v1, cgroup v2, Slurm."""
    memory_bytes: Setting
    """Bytes this process may still take before something is killed or swapped."""
    total_memory_bytes: int
    disk_free_bytes: int
    """Free bytes where the cache lies or will lie."""
    gpus: int

    def __str__(self) -> str:
        memory = (
            f"{self.memory_bytes.value / GB:.1f} of {self.total_memory_bytes / GB:.1f} GB RAM "
            f"({self.memory_bytes.reason})"
        )
        return f"{_cpus_text(self)}, {memory}, {_count(self.gpus, 'GPU')}, {self.disk_free_bytes / GB:.1f} GB disk free"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a preparation uses the machine. No value here changes the prepared bytes."""

    machine: Machine
    num_proc: Setting
    """Worker processes; 0 works in this process; None for what a cluster will have."""
    threads: Setting
    """Tokenizer (Rayon) threads in each worker."""
    batch_bytes: Setting
    """Bytes of text in a batch at most."""
    memory_mode: Setting
    warnings: tuple[str, ...] = ()


def instruction_sets() -> set[str]:
    """Of this processor, those that decide how fast numbers are computed; empty where the kernel does not tell."""
    known = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return known & set(found[1].split()) if found else set()


def detect(cache_dir: Path, *, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Machine:
    """Read the limits of this process. `root` is where /proc and /sys are found; `cache_dir` need not exist yet."""
    memory, total = _memory(root)
    place = next(
        p for p in (cache_dir.expanduser().absolute(), *cache_dir.expanduser().absolute().parents) if p.exists()
    )
    return Machine(
        cpus=_cpus(root, environ),
        memory_bytes=memory,
        total_memory_bytes=total,
        disk_free_bytes=shutil.disk_usage(place).free,
        gpus=_gpus(root, environ),
    )


def worker_bytes(shard_bytes: int) -> int:
    """Peak memory of one worker, an estimate: 300 MB for interpreter, libraries, tokenizer and a batch, plus six
    shards.

    A stand-in worker (parse, encode with a 60k BPE, pack, write; 16 and 32 MB shards of Korean, English and code)
    peaked at 210 MB with 1 MiB batches, 282 MB with 4 MiB and 397 MB with 8 MiB; this rule gives 396 MB for 16 MB and
    492 MB for 32 MB.
    """
    return 300_000_000 + 6 * shard_bytes


def plan(
    machine: Machine,
    *,
    num_proc: int | None,
    num_proc_origin: str,
    local_world_size: int,
    ranks_wait: bool,
    memory_mode: str,
    shard_bytes: int,
    batch_size: int,
    environ: Mapping[str, str],
    worker_extra_bytes: int = 0,
) -> Plan:
    """Choose workers, threads and batch bytes. What a person set is never cut, only warned about.

    ranks_wait  the other local ranks sleep until the data is there, so the preparer takes all CPUs; else it keeps to
                its share
    worker_extra_bytes  what each worker loads for itself beside what `worker_bytes` counts
    """
    each = worker_bytes(shard_bytes) + worker_extra_bytes
    mode = _mode(machine, memory_mode)
    usable = _usable_cpus(machine, local_world_size, ranks_wait, environ)
    explicit = num_proc is not None and num_proc_origin != "default"
    workers = (
        Setting(num_proc, f"set by {num_proc_origin}")
        if explicit
        else _automatic_workers(machine, usable, mode.value, each)
    )
    threads, warnings = _threads(usable, workers.value, environ)
    if explicit:
        warnings += _excess(machine, usable, workers, each)
    batch_bytes = Setting(
        _BATCH_BYTES[mode.value], f"memory mode {mode.value}; {batch_size:,} documents where they are smaller"
    )
    return Plan(
        machine=machine, num_proc=workers, threads=threads, batch_bytes=batch_bytes, memory_mode=mode, warnings=warnings
    )


def over_cluster(chosen: Plan, num_proc: int | None) -> Plan:
    """The same where a Ray cluster does the work, whose size is known once it is there."""
    tasks = chosen.num_proc if num_proc else Setting(None, "as many as the Ray cluster has CPUs")
    return replace(chosen, num_proc=tasks, threads=Setting(1, "of a task of Ray"), warnings=())


def lines(chosen: Plan) -> tuple[str, ...]:
    """The log lines of a plan, in the words people look for: the memory mode, then each value with its reason."""
    settings = (
        ("Parallel processes: num_proc", chosen.num_proc),
        ("Tokenizer threads: threads", chosen.threads),
        ("Batch size: batch_bytes", chosen.batch_bytes),
    )
    mode_line = _MODE_LINES[chosen.memory_mode.value].format(gb=f"{chosen.machine.memory_bytes.value / GB:.1f}")
    if chosen.memory_mode.reason.startswith("set"):
        mode_line = f"memory_mode = {chosen.memory_mode.value}: {chosen.memory_mode.reason}"
    return (
        mode_line,
        "📊 Dataset loading settings:",
        *(f"  - {name} = {setting.value}: {setting.reason}" for name, setting in settings),
    )


def exports(machine: Machine, environ: Mapping[str, str]) -> dict[str, Setting]:
    """Values for the environment variables that `environ` leaves unset, each with its reason.

    DATASET_BATCH_SIZE         documents of 2 KB that fill a batch of the memory mode (disk 512, balanced 2048, memory
                               4096)
    DATASET_WRITER_BATCH_SIZE  rows of 8 KB (2048 tokens of 4 bytes) in a tenth of one worker's part of the memory
                               budget
    OMP_NUM_THREADS            a share for each local rank: torchrun and accelerate would make it 1, which slows Arrow
                               too
    """
    ranks, origin = _ranks_per_node(machine, environ)
    chosen = plan(machine, num_proc=None, num_proc_origin="default", local_world_size=ranks, ranks_wait=True,
                  memory_mode="auto", shard_bytes=16_000_000, batch_size=1000, environ=environ)  # fmt: skip
    sharing = max(1, ranks // _slurm_shares(environ))
    cpus, mode = machine.cpus.value, chosen.memory_mode.value
    tenth = machine.memory_bytes.value // _MEMORY_PARTS[mode] // chosen.num_proc.value // 10
    rows = min(100_000, max(1000, tenth // 8192 // 1000 * 1000))
    values = {
        "TOKENIZERS_PARALLELISM": Setting("true", "threads inside a tokenizer call; workers divide RAYON_NUM_THREADS"),
        "RAYON_NUM_THREADS": Setting(cpus, f"{_cpus_text(machine)}, a total that the workers divide"),
        "OMP_NUM_THREADS": Setting(
            max(1, cpus // sharing), f"{_cpus_text(machine)} / {_count(sharing, 'rank')} ({origin})"
        ),
        "DATASET_NUM_PROC": Setting(chosen.num_proc.value, chosen.num_proc.reason),
        "DATASET_BATCH_SIZE": Setting(
            chosen.batch_bytes.value // 2048, f"memory mode {mode}: {chosen.memory_mode.reason}"
        ),
        "DATASET_WRITER_BATCH_SIZE": Setting(
            rows, f"a tenth of each worker's part of {machine.memory_bytes.value / GB:.1f} GB RAM"
        ),
        "ARROW_DEFAULT_MEMORY_POOL": Setting("mimalloc", "gives freed batches back to the system"),
        "ARROW_IO_THREADS": Setting(min(16, cpus), f"at most 16 of {_cpus_text(machine)}"),
    }
    return {name: setting for name, setting in values.items() if name not in environ}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moai.core.resources", description="What this process may use here.", allow_abbrev=False
    )
    parser.add_argument(
        "--exports", action="store_true", help="print `export NAME=value` lines for what the environment leaves unset"
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="print the machine on one line (the default; before the exports if both are asked for)",
    )
    arguments = parser.parse_args(argv)
    machine = detect(Path.cwd())
    if arguments.summary or not arguments.exports:
        print(machine)
    if arguments.exports:
        for name, setting in exports(machine, os.environ).items():
            print(f"export {name}={shlex.quote(str(setting.value))}  # {setting.reason}")
    return 0


def _cpus_text(machine: Machine) -> str:
    return f"{_count(machine.cpus.value, 'CPU')} ({machine.cpus.reason})"


def _count(number: float, word: str) -> str:
    return f"{number:g} {word}{'' if number == 1 else 's'}"


def _mode(machine: Machine, wanted: str) -> Setting:
    if wanted != "auto":
        assert wanted in MEMORY_MODES, wanted
        return Setting(wanted, f"set, with {machine.memory_bytes.value / GB:.1f} GB available")
    available = machine.memory_bytes.value / GB
    mode = "memory" if available > 50 else "balanced" if available >= 20 else "disk"
    return Setting(mode, f"{available:.1f} GB available ({machine.memory_bytes.reason})")


def _usable_cpus(machine: Machine, local_world_size: int, ranks_wait: bool, environ: Mapping[str, str]) -> Setting:
    """The CPUs this preparation may take: all while the other ranks only wait, else this rank's share."""
    sharing = max(1, local_world_size // _slurm_shares(environ))
    if local_world_size == 1 or sharing == 1:
        return Setting(machine.cpus.value, _cpus_text(machine))
    if ranks_wait:
        each = round(machine.cpus.value / sharing, 2)
        waiting = f"{sharing - 1} of which wait{'s' if sharing == 2 else ''}"
        return Setting(
            machine.cpus.value,
            f"{_count(each, 'CPU')} a rank x {sharing} ranks, {waiting} ({_count(machine.cpus.value, 'CPU')}, "
            f"{machine.cpus.reason})",
        )
    return Setting(max(1, machine.cpus.value // sharing), f"{_cpus_text(machine)} / {sharing} ranks")


def _slurm_shares(environ: Mapping[str, str]) -> int:
    """Slurm tasks on this node where each has its own CPUs, else 1: with one task a rank, `cpus` is a rank's share
    already.
    """
    if _positive(environ.get("SLURM_CPUS_PER_TASK")) is None:
        return 1
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    # "8(x2)" is 8 tasks on each of two nodes, "8,4" eight on the first and four on the second.
    return next((int(match[0]) for name in names if (match := re.match(r"[1-9][0-9]*", environ.get(name, "")))), 1)


def _automatic_workers(machine: Machine, usable: Setting, mode: str, each: int) -> Setting:
    """`each` is bytes a worker."""
    budget = machine.memory_bytes.value // _MEMORY_PARTS[mode]
    affordable = max(1, budget // each)
    if affordable >= usable.value:
        return usable
    cut = (
        f"cut by memory: 1/{_MEMORY_PARTS[mode]} of {machine.memory_bytes.value / GB:.1f} GB "
        f"({machine.memory_bytes.reason}) at {each / GB:.2f} GB a worker"
    )
    return Setting(affordable, f"{usable.reason}, {cut}")


def _threads(usable: Setting, workers: int, environ: Mapping[str, str]) -> tuple[Setting, tuple[str, ...]]:
    if environ.get("TOKENIZERS_PARALLELISM", "true").lower() in FALSE_WORDS:
        return Setting(1, f"TOKENIZERS_PARALLELISM={environ['TOKENIZERS_PARALLELISM']}"), ()
    place = _count(workers, "worker") if workers else "this process alone"
    text = environ.get("RAYON_NUM_THREADS", "")
    total = _positive(text)
    if total is not None:
        over = (
            f"RAYON_NUM_THREADS = {total} is more than the {_count(usable.value, 'CPU')} this preparation may use: "
            f"{usable.reason}. Kept.",
        )
        return Setting(
            max(1, total // max(1, workers)), f"RAYON_NUM_THREADS={total} / {place}"
        ), over if total > usable.value else ()
    ignored = (
        f"RAYON_NUM_THREADS = {text!r} is not a whole number above 0 and is ignored; unset it or set it to "
        f"{usable.value}",
    )
    return Setting(
        max(1, usable.value // max(1, workers)), f"{_count(usable.value, 'CPU')} / {place}"
    ), ignored if text not in ("", "0") else ()


def _excess(machine: Machine, usable: Setting, workers: Setting, each: int) -> tuple[str, ...]:
    found = []
    place = f"num_proc = {workers.value} ({workers.reason})"
    if workers.value > usable.value:
        found.append(
            f"{place} is more than this preparation may use, {usable.value}: {usable.reason}. Kept; num_proc "
            f"{usable.value} is as fast and lighter."
        )
    need, have = workers.value * each, machine.memory_bytes.value
    if need > have:
        fits = max(1, have // _MEMORY_PARTS["memory"] // each)
        found.append(
            f"{place} may need {need / GB:.1f} GB of the {have / GB:.1f} GB available ({machine.memory_bytes.reason}). "
            f"Kept; num_proc {fits} fits."
        )
    return tuple(found)


def _ranks_per_node(machine: Machine, environ: Mapping[str, str]) -> tuple[int, str]:
    for name in ("NUM_GPUS", "NPROC_PER_NODE", "LOCAL_WORLD_SIZE"):
        ranks = _positive(environ.get(name))
        if ranks is not None:
            return ranks, name
    return max(1, machine.gpus), f"{_count(machine.gpus, 'GPU')} found"


def _cpus(root: Path, environ: Mapping[str, str]) -> Setting:
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    limits = [(affinity, "all cores" if affinity == cores else "affinity")]
    for version, directory in cgroups(root, "cpu"):
        quota = _cpu_quota(directory)
        if quota is not None:
            limits.append(
                (max(1, math.ceil(quota)), version)
            )  # 1.5 CPUs keep two workers busy: the quota is used up, not exceeded
    slurm = _positive(environ.get("SLURM_CPUS_PER_TASK"))
    if slurm is not None:
        limits.append((slurm, "Slurm"))
    return Setting(*min(limits, key=lambda limit: limit[0]))


def _cpu_quota(directory: Path) -> float | None:
    """CPUs' worth of time in each period: v2 `cpu.max` is "200000 100000" or "max 100000", v1 has a file each and
    -1.
    """
    v1 = f"{read_text(directory / 'cpu.cfs_quota_us')} {read_text(directory / 'cpu.cfs_period_us')}"
    for text in (read_text(directory / "cpu.max"), v1):
        match = re.fullmatch(r"\s*([1-9][0-9]*)\s+([1-9][0-9]*)\s*", text)
        if match:
            return int(match[1]) / int(match[2])
    return None


def _memory(root: Path) -> tuple[Setting, int]:
    """(bytes this process may still take, bytes it may have in all)."""
    total, available, reason = host_memory(root)
    limits, totals = [(available, reason)], [total]
    for version, directory in cgroups(root, "memory"):
        # Above memory.high a group is slowed to a crawl rather than killed: for a plan that is a limit too.
        maximum = min(bytes_in(directory / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes"))
        if maximum >= UNLIMITED:
            continue
        used = min(bytes_in(directory / name) for name in ("memory.current", "memory.usage_in_bytes"))
        # Page cache nobody touches is counted as used, yet it goes as soon as memory is asked for.
        stat = dict(
            line.split() for line in read_text(directory / "memory.stat").splitlines() if len(line.split()) == 2
        )
        idle = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
        limits.append((min(maximum, max(0, maximum - (used if used < UNLIMITED else 0) + idle)), version))
        totals.append(maximum)
    return Setting(*min(limits, key=lambda limit: limit[0])), min(totals)


def bytes_in(path: Path) -> int:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else UNLIMITED


def host_memory(root: Path) -> tuple[int, int, str]:
    """(total, available, reason) of the whole machine."""
    fields = dict(
        re.findall(r"^(MemTotal|MemAvailable):\s+([0-9]+) kB", read_text(root / "proc/meminfo"), flags=re.MULTILINE)
    )
    if len(fields) == 2:
        return int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024, "MemAvailable"
    try:
        import psutil  # only where there is no /proc, as on macOS
    except ImportError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total // 2, "half of physical memory: psutil is not installed"
    memory = psutil.virtual_memory()
    return memory.total, memory.available, "psutil"


def cgroups(root: Path, controller: str) -> list[tuple[str, Path]]:
    """The control groups of this process for `controller`, innermost first: ("cgroup v2", directory).

    Limits hold along the whole path, and a pod's parent may be tighter than the container itself. Hybrid systems mount
    both versions; a directory without the controller's files is a group without a limit.
    """
    own: dict[str, str] = {}  # controller -> path; v2 is the empty name
    for names, path in re.findall(
        r"^[0-9]+:([^:\n]*):(/.*)$", read_text(root / "proc/self/cgroup"), flags=re.MULTILINE
    ):
        own.update(dict.fromkeys(names.split(","), path))
    found = []
    mounts = re.findall(
        r"^\S+ \S+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)$",
        read_text(root / "proc/self/mountinfo"),
        flags=re.MULTILINE,
    )
    for mount_root, mount_point, kind, options in mounts:
        name = "" if kind == "cgroup2" else controller
        if name not in own or (name and name not in options.split(",")):
            continue
        parts = _below(own[name], mount_root)
        top = root / mount_point.lstrip("/")
        found += [
            ("cgroup v2" if kind == "cgroup2" else "cgroup v1", top.joinpath(*parts[:depth]))
            for depth in range(len(parts), -1, -1)
        ]
    return found


def _below(path: str, mount_root: str) -> tuple[str, ...]:
    """`path` seen from the mount; in a container whose mount shows another part of the tree, the mount is the group."""
    try:
        return PurePosixPath(path).relative_to(mount_root).parts
    except ValueError:
        return ()


def _gpus(root: Path, environ: Mapping[str, str]) -> int:
    """NVIDIA devices this process sees, without importing torch."""
    driver = root / "proc/driver/nvidia/gpus"
    present = len(list(driver.iterdir())) if driver.is_dir() else _count_with_nvidia_smi(environ)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA reads the list up to the first entry it does not know, which is how "-1" hides every device.
    names = [name.strip() for name in visible.split(",")]
    hidden = next((i for i, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
    return min(present, hidden)


def _count_with_nvidia_smi(environ: Mapping[str, str]) -> int:
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return 0
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0  # a driver that does not answer gives no device to train on either
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def _positive(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and int(text) > 0 else None


def read_text(path: Path) -> str:
    """The text of a small kernel file, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
