"""What this process may use, read from faked and real kernel files, and the plan that follows from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.core import resources
from moai.core.config import Setting
from moai.core.resources import GB, Machine, detect, exports, lines, plan

REPO = Path(__file__).resolve().parents[2]
V2_MOUNT = "25 24 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def kernel(
    root: Path,
    *,
    groups: str,
    mounts: tuple[str, ...] = (V2_MOUNT,),
    files: dict[str, str] | None = None,
    meminfo_gb: tuple[int, int] = (256, 200),
) -> Path:
    """A root with /proc and /sys/fs/cgroup as the kernel would show them; `files` are relative to /sys/fs/cgroup."""
    total, available = meminfo_gb
    tree = {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": "22 27 0:21 / /proc rw - proc proc rw\n" + "\n".join(mounts) + "\n",
        "proc/meminfo": f"MemTotal:       {total * GB // 1024} kB\nMemFree:        1 kB\nMemAvailable:   "
        f"{available * GB // 1024} kB\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in (files or {}).items()},
    }
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def host_of_96(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is larger than the machines that run these tests; the real affinity call has its own test."""
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)


CPU_CASES = {
    "v2 without a quota": ("0::/pod/box\n", (V2_MOUNT,), {"pod/box/cpu.max": "max 100000\n"}, {}, 96, "all cores"),
    "v2 quota": ("0::/pod/box\n", (V2_MOUNT,), {"pod/box/cpu.max": "1200000 100000\n"}, {}, 12, "cgroup v2"),
    "v2 parent is tighter": (
        "0::/pod/box\n",
        (V2_MOUNT,),
        {"pod/box/cpu.max": "800000 100000\n", "pod/cpu.max": "400000 100000\n"},
        {},
        4,
        "cgroup v2",
    ),
    "v2 in a namespace": ("0::/\n", (V2_MOUNT,), {"cpu.max": "200000 100000\n"}, {}, 2, "cgroup v2"),
    "v2 outside its namespace": ("0::/../other\n", (V2_MOUNT,), {"cpu.max": "300000 100000\n"}, {}, 3, "cgroup v2"),
    "v2 host path in a container": (
        "0::/docker/abc\n",
        (V2_MOUNT,),
        {"cpu.max": "500000 100000\n"},
        {},
        5,
        "cgroup v2",
    ),
    "a part of a CPU is one worker": ("0::/\n", (V2_MOUNT,), {"cpu.max": "50000 100000\n"}, {}, 1, "cgroup v2"),
    "one and a half CPUs keep two busy": ("0::/\n", (V2_MOUNT,), {"cpu.max": "150000 100000\n"}, {}, 2, "cgroup v2"),
    "v1 quota": (
        "4:memory:/x\n1:cpu,cpuacct:/x\n",
        (V1_MEMORY_MOUNT, V1_CPU_MOUNT),
        {"cpu,cpuacct/x/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
        {},
        6,
        "cgroup v1",
    ),
    "v1 parent is tighter": (
        "1:cpu,cpuacct:/x/y\n",
        (V1_CPU_MOUNT,),
        {
            "cpu,cpuacct/x/y/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/x/y/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/x/cpu.cfs_quota_us": "350000\n",
            "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n",
        },
        {},
        7,
        "cgroup v1",
    ),
    "v1 without a quota": (
        "1:cpu,cpuacct:/\n",
        (V1_CPU_MOUNT,),
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        {},
        96,
        "all cores",
    ),
    "v1 mount of a container": (
        "1:cpu,cpuacct:/docker/abc\n",
        (V1_CPU_MOUNT.replace(" / /sys", " /docker/abc /sys"),),
        {"cpu,cpuacct/cpu.cfs_quota_us": "900000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        {},
        9,
        "cgroup v1",
    ),
    "v1 mount of another part of the tree": (
        "1:cpu,cpuacct:/user.slice\n",
        (V1_CPU_MOUNT.replace(" / /sys", " /docker/abc /sys"),),
        {"cpu,cpuacct/cpu.cfs_quota_us": "900000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        {},
        9,
        "cgroup v1",
    ),
    "hybrid: v1 beside an empty v2": (
        "1:cpu,cpuacct:/x\n0::/x\n",
        (
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw",
            V1_CPU_MOUNT,
            V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        ),
        {
            "unified/cgroup.procs": "1\n",
            "cpu,cpuacct/x/cpu.cfs_quota_us": "800000\n",
            "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
        },
        {},
        8,
        "cgroup v1",
    ),
    "Slurm below the quota": (
        "0::/\n",
        (V2_MOUNT,),
        {"cpu.max": "1200000 100000\n"},
        {"SLURM_CPUS_PER_TASK": "8"},
        8,
        "Slurm",
    ),
    "Slurm above the quota": (
        "0::/\n",
        (V2_MOUNT,),
        {"cpu.max": "1200000 100000\n"},
        {"SLURM_CPUS_PER_TASK": "64"},
        12,
        "cgroup v2",
    ),
    "Slurm without a number": ("0::/\n", (V2_MOUNT,), {}, {"SLURM_CPUS_PER_TASK": ""}, 96, "all cores"),
    "no cgroups at all": ("", (), {}, {}, 96, "all cores"),
}


@pytest.mark.usefixtures("host_of_96")
@pytest.mark.parametrize("case", CPU_CASES)
def test_the_tightest_cpu_limit_decides_and_is_named(case: str, tmp_path: Path) -> None:
    groups, mounts, files, environ, cpus, reason = CPU_CASES[case]
    root = kernel(tmp_path, groups=groups, mounts=mounts, files=files)
    assert detect(tmp_path, root=root, environ=environ).cpus == Setting(cpus, reason)


@pytest.mark.usefixtures("host_of_96")
def test_a_narrower_affinity_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert detect(tmp_path, root=kernel(tmp_path, groups=""), environ={}).cpus == Setting(3, "affinity")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_a_process_bound_to_one_core_finds_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from moai.core.resources import main; "
        "main(['--summary'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=without_settings(), capture_output=True, text=True, check=True
    ).stdout
    assert found.startswith("1 CPU (")


MEMORY_CASES = {
    "v2 limit, less what is used, plus idle cache": (
        "0::/box\n",
        (V2_MOUNT,),
        {
            "box/memory.max": "8000000000\n",
            "box/memory.current": "6000000000\n",
            "box/memory.stat": "anon 1\ninactive_file 1000000000\n",
        },
        (256, 200),
        3 * GB,
        "cgroup v2",
        8 * GB,
    ),
    "v2 parent is tighter": (
        "0::/pod/box\n",
        (V2_MOUNT,),
        {
            "pod/box/memory.max": "max\n",
            "pod/box/memory.current": "1\n",
            "pod/memory.max": "4000000000\n",
            "pod/memory.current": "1500000000\n",
        },
        (256, 200),
        2_500_000_000,
        "cgroup v2",
        4 * GB,
    ),
    "v2 memory.high is a limit too": (
        "0::/\n",
        (V2_MOUNT,),
        {"memory.max": "8000000000\n", "memory.high": "5000000000\n", "memory.current": "1000000000\n"},
        (256, 200),
        4 * GB,
        "cgroup v2",
        5 * GB,
    ),
    "v2 used up is nothing, not less": (
        "0::/\n",
        (V2_MOUNT,),
        {"memory.max": "2000000000\n", "memory.current": "2500000000\n"},
        (256, 200),
        0,
        "cgroup v2",
        2 * GB,
    ),
    "v1 limit": (
        "4:memory:/x\n",
        (V1_CPU_MOUNT, V1_MEMORY_MOUNT),
        {
            "memory/x/memory.limit_in_bytes": "4000000000\n",
            "memory/x/memory.usage_in_bytes": "1000000000\n",
            "memory/x/memory.stat": "inactive_file 7\ntotal_inactive_file 500000000\n",
        },
        (256, 200),
        3_500_000_000,
        "cgroup v1",
        4 * GB,
    ),
    "the host is tighter than its container": (
        "0::/\n",
        (V2_MOUNT,),
        {"memory.max": "64000000000\n", "memory.current": "0\n"},
        (128, 5),
        5 * GB,
        "MemAvailable",
        64 * GB,
    ),
    "v1 without a limit": (
        "4:memory:/x\n",
        (V1_MEMORY_MOUNT,),
        {"memory/x/memory.limit_in_bytes": "9223372036854771712\n", "memory/x/memory.usage_in_bytes": "1\n"},
        (256, 200),
        200 * GB,
        "MemAvailable",
        256 * GB,
    ),
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_the_tightest_memory_limit_decides_and_is_named(case: str, tmp_path: Path) -> None:
    groups, mounts, files, meminfo_gb, available, reason, total = MEMORY_CASES[case]
    found = detect(
        tmp_path, root=kernel(tmp_path, groups=groups, mounts=mounts, files=files, meminfo_gb=meminfo_gb), environ={}
    )
    assert found.memory_bytes.reason == reason
    assert found.memory_bytes.value == pytest.approx(available, abs=1024)
    assert found.total_memory_bytes == pytest.approx(total, abs=1024)


def test_without_proc_the_memory_is_the_real_one(tmp_path: Path) -> None:
    found = detect(tmp_path, root=tmp_path, environ={})
    assert found.memory_bytes.reason == "psutil"
    assert 0 < found.memory_bytes.value <= found.total_memory_bytes


def test_disk_space_is_that_of_the_nearest_existing_directory(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    assert detect(missing, environ={}).disk_free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert not missing.parent.exists()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("0,1,2,3,4,5", 4), ("GPU-a, GPU-b", 2)],
)
def test_gpus_are_counted_without_torch(visible: str | None, expected: int, tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / "proc/driver/nvidia/gpus" / f"0000:0{n}:00.0").mkdir(parents=True)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert detect(tmp_path, root=tmp_path, environ=environ).gpus == expected


def test_gpus_are_asked_of_nvidia_smi_where_the_driver_shows_none(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n[ \"$1\" = -L ] && printf 'GPU 0: A (UUID: GPU-1)\\nGPU 1: A (UUID: GPU-2)\\n'\n")
    program.chmod(0o755)
    assert detect(tmp_path, root=tmp_path, environ={"PATH": str(tmp_path)}).gpus == 2
    assert detect(tmp_path, root=tmp_path, environ={"PATH": str(tmp_path / "empty")}).gpus == 0


def machine(cpus: int = 96, gb: float = 200.0, *, gpus: int = 0, reason: str = "cgroup v2") -> Machine:
    return Machine(
        cpus=Setting(cpus, reason),
        memory_bytes=Setting(int(gb * GB), "cgroup v2"),
        total_memory_bytes=int(gb * GB),
        disk_free_bytes=GB,
        gpus=gpus,
    )


def planned(
    on: Machine,
    *,
    num_proc: int | None = None,
    origin: str = "default",
    ranks: int = 1,
    wait: bool = False,
    mode: str = "auto",
    **environ: str,
) -> resources.Plan:
    return plan(
        on,
        num_proc=num_proc,
        num_proc_origin=origin,
        local_world_size=ranks,
        ranks_wait=wait,
        memory_mode=mode,
        shard_bytes=16_000_000,
        batch_size=1000,
        environ=environ,
    )


@pytest.mark.parametrize(
    ("cpus", "ranks", "wait", "num_proc", "reason"),
    [
        (96, 8, False, 12, "96 CPUs (cgroup v2) / 8 ranks"),
        (96, 8, True, 96, "12 CPUs a rank x 8 ranks, 7 of which wait (96 CPUs, cgroup v2)"),
        (96, 1, False, 96, "96 CPUs (cgroup v2)"),
        (7, 2, False, 3, "7 CPUs (cgroup v2) / 2 ranks"),
        (2, 8, False, 1, "2 CPUs (cgroup v2) / 8 ranks"),
        (7, 2, True, 7, "3.5 CPUs a rank x 2 ranks, 1 of which waits (7 CPUs, cgroup v2)"),
        (1, 3, True, 1, "0.33 CPUs a rank x 3 ranks, 2 of which wait (1 CPU, cgroup v2)"),
    ],
)
def test_num_proc_scales_with_the_world_size(cpus: int, ranks: int, wait: bool, num_proc: int, reason: str) -> None:
    assert planned(machine(cpus), ranks=ranks, wait=wait).num_proc == Setting(num_proc, reason)


@pytest.mark.parametrize(
    "shares",
    [
        {"SLURM_NTASKS_PER_NODE": "8"},
        {"SLURM_TASKS_PER_NODE": "8(x2)"},
        {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "1"},
    ],
)
def test_a_slurm_share_for_each_rank_is_not_divided_again(shares: dict[str, str]) -> None:
    on = machine(12, reason="Slurm")
    assert planned(on, ranks=8, SLURM_CPUS_PER_TASK="12", **shares).num_proc == Setting(12, "12 CPUs (Slurm)")
    assert (
        planned(on, ranks=8, SLURM_CPUS_PER_TASK="12", SLURM_NTASKS_PER_NODE="1").num_proc.value == 1
    )  # one task that starts all ranks


def test_memory_cuts_an_automatic_num_proc_and_says_so() -> None:
    cut = planned(machine(96, 30)).num_proc  # half of 30 GB at 0.396 GB a worker: 37
    assert cut == Setting(37, "96 CPUs (cgroup v2), cut by memory: 1/2 of 30.0 GB (cgroup v2) at 0.40 GB a worker")
    assert planned(machine(96, 0.1)).num_proc.value == 1


def test_disk_mode_leaves_more_memory_to_the_page_cache() -> None:
    assert planned(machine(96, 100)).num_proc.value == 96
    assert planned(machine(96, 100), mode="disk").num_proc.value == 63  # a quarter of 100 GB at 0.396 GB


@pytest.mark.parametrize("origin", ["flag", "environment DATASET_NUM_PROC", "file run.yaml"])
def test_an_explicit_num_proc_is_never_cut_only_warned_about(origin: str) -> None:
    chosen = planned(machine(2, 4), num_proc=500, origin=origin)
    assert chosen.num_proc == Setting(500, f"set by {origin}")
    cores, memory = chosen.warnings
    assert origin in cores
    assert "2 CPUs (cgroup v2)" in cores
    assert "198.0 GB of the 4.0 GB" in memory
    assert "num_proc 5 fits" in memory


def test_an_explicit_num_proc_within_bounds_is_silent() -> None:
    assert planned(machine(96), num_proc=96, origin="flag").warnings == ()
    assert planned(machine(96), num_proc=13, origin="flag", ranks=8).warnings != ()  # the share is 12
    assert planned(machine(96), num_proc=13, origin="flag", ranks=8, wait=True).warnings == ()


@pytest.mark.parametrize(
    ("num_proc", "environ", "threads"),
    [
        (12, {}, 8),
        (96, {}, 1),
        (200, {}, 1),
        (0, {}, 96),
        (12, {"RAYON_NUM_THREADS": "48"}, 4),
        (12, {"RAYON_NUM_THREADS": "6"}, 1),
        (0, {"RAYON_NUM_THREADS": "6"}, 6),
        (12, {"RAYON_NUM_THREADS": "0"}, 8),
        (0, {"TOKENIZERS_PARALLELISM": "false"}, 1),
        (12, {"TOKENIZERS_PARALLELISM": "true"}, 8),
    ],
)
def test_threads_of_all_workers_stay_within_the_total(num_proc: int, environ: dict[str, str], threads: int) -> None:
    chosen = planned(machine(96), num_proc=num_proc, origin="flag", **environ)
    assert chosen.threads.value == threads
    assert not any("RAYON" in warning for warning in chosen.warnings)


def test_more_threads_than_cpus_are_kept_and_warned_about() -> None:
    chosen = planned(machine(2), RAYON_NUM_THREADS="48")
    assert chosen.threads == Setting(24, "RAYON_NUM_THREADS=48 / 2 workers")
    assert "more than the 2 CPUs" in chosen.warnings[0]


def test_an_unreadable_rayon_setting_is_warned_about() -> None:
    chosen = planned(machine(96), num_proc=12, origin="flag", RAYON_NUM_THREADS="many")
    assert chosen.threads.value == 8
    assert "RAYON_NUM_THREADS = 'many'" in chosen.warnings[0]


@pytest.mark.parametrize(
    ("gb", "mode", "mib"), [(50.1, "memory", 8), (50, "balanced", 4), (20, "balanced", 4), (19.9, "disk", 1)]
)
def test_the_memory_mode_follows_what_is_available_and_bounds_a_batch(gb: float, mode: str, mib: int) -> None:
    chosen = planned(machine(gb=gb))
    assert (chosen.memory_mode.value, chosen.batch_bytes.value) == (mode, mib * 2**20)
    assert planned(machine(gb=gb), mode="disk").batch_bytes.value == 2**20


def test_the_log_says_what_people_look_for() -> None:
    said = lines(planned(machine(96, 85.3), ranks=8))
    assert said[0] == "✅ Sufficient RAM (85.3GB available), using in-memory processing"
    assert said[1:3] == (
        "📊 Dataset loading settings:",
        "  - Parallel processes: num_proc = 12: 96 CPUs (cgroup v2) / 8 ranks",
    )
    assert "Moderate RAM (30.0GB available), using balanced processing" in lines(planned(machine(gb=30)))[0]
    assert "Limited RAM (4.0GB available), using disk-based processing" in lines(planned(machine(gb=4)))[0]
    assert lines(planned(machine(gb=4), mode="memory"))[0] == "memory_mode = memory: set, with 4.0 GB available"


@given(
    cpus=st.integers(1, 512),
    gb=st.floats(0, 2000),
    ranks=st.integers(1, 64),
    wait=st.booleans(),
    mode=st.sampled_from(["auto", *resources.MEMORY_MODES]),
)
def test_an_automatic_plan_never_exceeds_the_machine(cpus: int, gb: float, ranks: int, wait: bool, mode: str) -> None:
    on = machine(cpus, gb)
    chosen = planned(on, ranks=ranks, wait=wait, mode=mode)
    workers, budget = chosen.num_proc.value, on.memory_bytes.value // 2
    assert 1 <= workers * chosen.threads.value <= cpus
    assert workers == 1 or workers * resources.worker_bytes(16_000_000) <= budget
    assert chosen.warnings == ()


def test_exports_leave_what_is_set_and_share_cores_among_ranks() -> None:
    made = exports(machine(96, 200), {"NUM_GPUS": "4", "DATASET_NUM_PROC": "", "ARROW_IO_THREADS": "3"})
    assert made["OMP_NUM_THREADS"] == Setting(24, "96 CPUs (cgroup v2) / 4 ranks (NUM_GPUS)")
    assert "DATASET_NUM_PROC" not in made
    assert "ARROW_IO_THREADS" not in made
    assert exports(machine(96, gpus=8), {})["OMP_NUM_THREADS"].value == 12
    assert exports(machine(96, gpus=8), {"NUM_GPUS": "auto", "LOCAL_WORLD_SIZE": "2"})["OMP_NUM_THREADS"].value == 48
    a_share_a_rank = {"NUM_GPUS": "8", "SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "8"}
    assert exports(machine(12, reason="Slurm"), a_share_a_rank)["OMP_NUM_THREADS"].value == 12
    assert "OMP_PROC_BIND" not in exports(machine(), {})  # it would pin every worker to the same cores


def test_exported_batches_follow_cores_and_memory() -> None:
    sizes = {
        name: [exports(machine(cpus, gb), {})[name].value for cpus, gb in ((8, 8), (8, 30), (8, 60), (96, 60))]
        for name in ("DATASET_BATCH_SIZE", "DATASET_WRITER_BATCH_SIZE")
    }
    assert sizes["DATASET_BATCH_SIZE"] == [512, 2048, 4096, 4096]
    assert sizes["DATASET_WRITER_BATCH_SIZE"] == [
        4000,
        22000,
        45000,
        4000,
    ]  # e.g. a tenth of (half of 30 GB) / 8 workers in rows of 8 KiB


def without_settings(**extra: str) -> dict[str, str]:
    """This environment without what optimize_env.sh sets or reads."""
    names = {*exports(machine(), {}), "NUM_GPUS", "NPROC_PER_NODE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"}
    return {name: value for name, value in os.environ.items() if name not in names} | extra


def test_the_module_runs_without_warnings_and_without_any_package() -> None:
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); sys.argv[1:] = ['--exports']; "
        "runpy.run_module('moai.core.resources', run_name='__main__')"
    )
    bare = [sys.executable, "-I", "-S", "-W", "error", "-c", code]  # -S: site-packages are out of reach
    for command in ([sys.executable, "-W", "error", "-m", "moai.core.resources", "--exports"], bare):
        ran = subprocess.run(
            command, cwd=REPO, env=without_settings(DATASET_NUM_PROC="7"), capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert all(line.startswith("export ") and "  # " in line for line in ran.stdout.splitlines())
        assert "RAYON_NUM_THREADS=" in ran.stdout
        assert "DATASET_NUM_PROC=" not in ran.stdout


@pytest.fixture(params=["bash", "zsh", "sh"])
def shell(request: pytest.FixtureRequest) -> str:
    path = shutil.which(request.param)
    if path is None:
        pytest.skip(f"{request.param} is not installed")
    return path


def in_shell(shell: str, script: str, *, cwd: Path = REPO, **environ: str) -> str:
    ran = subprocess.run(
        [shell, "-c", script], cwd=cwd, env=without_settings(**environ), capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    return ran.stdout


def test_sourcing_sets_this_machine_s_values_and_keeps_the_user_s(shell: str) -> None:
    out = in_shell(
        shell,
        "set -eu; RAYON_NUM_THREADS=3; . ./optimize_env.sh; echo RAYON_NUM_THREADS=$RAYON_NUM_THREADS; env",
        DATASET_NUM_PROC="77",
        OMP_NUM_THREADS="",
        NUM_GPUS="1",
    )
    found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line and line[0].isupper())
    assert (found["DATASET_NUM_PROC"], found["RAYON_NUM_THREADS"], found["OMP_NUM_THREADS"]) == ("77", "3", "")
    by_memory = ("DATASET_BATCH_SIZE", "DATASET_WRITER_BATCH_SIZE")  # may change between two looks
    assert all(int(found[name]) > 0 for name in by_memory)
    rest = exports(
        detect(REPO, environ=without_settings()),
        {"RAYON_NUM_THREADS": "", "DATASET_NUM_PROC": "", "OMP_NUM_THREADS": "", **dict.fromkeys(by_memory, "")},
    )
    assert {name: found[name] for name in rest} == {name: str(setting.value) for name, setting in rest.items()}
    said = out.splitlines()[:3]
    assert "set:" in said[0]
    assert "(kept as you set them: RAYON_NUM_THREADS OMP_NUM_THREADS DATASET_NUM_PROC)" in said[0]
    assert "CPU" in said[1]
    assert "RAM" in said[1]
    assert "override" in said[2]


def test_a_number_of_ranks_that_is_set_but_not_exported_counts(shell: str) -> None:
    cpus = detect(REPO, environ=without_settings()).cpus.value
    assert in_shell(shell, '. ./optimize_env.sh; echo "$OMP_NUM_THREADS"').splitlines()[-1] == str(cpus)
    assert in_shell(shell, 'NUM_GPUS=1000; . ./optimize_env.sh; echo "$OMP_NUM_THREADS"').splitlines()[-1] == "1"


def test_sourcing_leaves_no_variable_function_or_option_behind(shell: str, tmp_path: Path) -> None:
    functions = "typeset -f" if not shell.endswith("/sh") else "true"
    script = (
        f"before=; after=; cd {tmp_path}; set > a; set -o > a.options; {functions} > a.functions; cd {REPO}; . "
        f"./optimize_env.sh; " + (f"cd {tmp_path}; set > b; set -o > b.options; {functions} > b.functions")
    )
    in_shell(shell, script)
    for kind in ("options", "functions"):
        assert (tmp_path / f"a.{kind}").read_text() == (tmp_path / f"b.{kind}").read_text()
    before, after = (
        {line.split("=")[0] for line in (tmp_path / name).read_text().splitlines() if "=" in line} for name in "ab"
    )
    assert after - before - {"OLDPWD"} == set(exports(machine(), {}))


@pytest.mark.parametrize("shell", ["bash", "zsh"], indirect=True)
def test_it_finds_itself_from_another_directory_with_spaces(shell: str, tmp_path: Path) -> None:
    (tmp_path / "a b").symlink_to(REPO)
    assert "CPU" in in_shell(shell, "set -eu; . 'a b/optimize_env.sh' && [ -n \"$DATASET_NUM_PROC\" ]", cwd=tmp_path)
    assert "getconf" not in in_shell(shell, f". '{tmp_path}/a b/optimize_env.sh'", cwd=Path("/"))


def test_without_python_it_says_so_and_counts_cores(shell: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("getconf", "dirname"):
        (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    shutil.copy(REPO / "optimize_env.sh", tmp_path)
    out = in_shell(
        shell,
        '. ./optimize_env.sh; echo "$DATASET_NUM_PROC $OMP_NUM_THREADS"',
        cwd=tmp_path,
        PATH=str(tmp_path / "bin"),
        NUM_GPUS="1",
        RAYON_NUM_THREADS="5",
    )
    cores = subprocess.run(["getconf", "_NPROCESSORS_ONLN"], capture_output=True, text=True, check=True).stdout.strip()
    assert out.splitlines()[-1] == f"{cores} {cores}"
    assert out.count("no Python 3.11") == 1
    assert "RAYON_NUM_THREADS=" not in out


def test_executing_instead_of_sourcing_is_told(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", str(REPO / "optimize_env.sh")],
        cwd=tmp_path,
        env=without_settings(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Source it" in ran.stderr
