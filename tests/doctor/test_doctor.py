"""The doctor on this machine, as a real process, and each check made to find what it is there for."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moai.core.config import Setting
from moai.core.resources import GB, Machine, exports
from moai.doctor import environment, filesystem
from moai.doctor.check import ADVICE, FAILED, OK, Check
from moai.doctor.summary import summarize
from moai.doctor.tokenization import check_round_trip, check_tokenizer, sample
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer

REPO = Path(__file__).resolve().parents[2]
SETTINGS = (
    "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "DATASET_NUM_PROC",
    "DATASET_BATCH_SIZE", "DATASET_WRITER_BATCH_SIZE", "ARROW_DEFAULT_MEMORY_POOL", "ARROW_IO_THREADS",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level_bpe(), tmp_path_factory.mktemp("tokenizer"))


def save(tokenizer: Any, directory: Path) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return directory


def byte_level_bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample()[0][:40], trainer)
    return tokenizer


def doctor(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environ
    command = [sys.executable, "-W", "error", str(REPO / "verify_optimization.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(cpus: int, gb: float) -> Machine:
    return Machine(
        cpus=Setting(cpus, "cgroup v2"),
        memory_bytes=Setting(int(gb * GB), "cgroup v2"),
        total_memory_bytes=int(gb * GB),
        disk_free_bytes=GB,
        gpus=0,
    )


def test_this_machine_passes_and_the_advice_stays_within_its_cores(tokenizer_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "mine").write_text("kept")
    flags = ("--tokenizer_path", tokenizer_path, "--cache_dir", cache, "--json")
    ran = doctor(*flags, DATASET_NUM_PROC="4800", RAYON_NUM_THREADS="480")
    checks: dict[str, dict[str, Any]] = {check["name"]: check for check in json.loads(ran.stdout)}
    assert (ran.returncode, ran.stderr) == (0, "")
    names = (
        "tokenizer, tokenizer backend, tokenizer speed, round trip, cores, memory, disk space, disk speed, rename, lock"
    )
    assert set(checks) == {*names.split(", "), "lock", "versions", *SETTINGS}
    assert all(
        set(check) == {"name", "value", "verdict", "remedy", "figures"} and check["verdict"] in (OK, ADVICE)
        for check in checks.values()
    )
    assert checks["tokenizer speed"]["figures"]["tokens_per_second"] > 1000
    assert checks["round trip"]["figures"] == {"lines": 200, "changed": 0}
    assert checks["rename"]["verdict"] == checks["lock"]["verdict"] == OK
    assert checks["disk speed"]["figures"]["write_mb_per_second"] > 0
    for name in ("DATASET_NUM_PROC", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_IO_THREADS"):
        assert 1 <= checks[name]["figures"]["recommended"] <= usable_cpus()
    assert checks["DATASET_NUM_PROC"]["verdict"] == checks["cores"]["verdict"] == ADVICE
    assert (
        f"DATASET_NUM_PROC={checks['DATASET_NUM_PROC']['figures']['recommended']}"
        in checks["DATASET_NUM_PROC"]["remedy"]
    )
    assert [path.name for path in cache.iterdir()] == ["mine"]


def test_a_slow_tokenizer_is_one_failed_line_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    missing = tmp_path / "not" / "yet"
    ran = doctor("--tokenizer_path", tmp_path, "--cache_dir", missing)
    assert (ran.returncode, ran.stderr) == (1, "")
    failed = [line for line in ran.stdout.splitlines() if FAILED in line]
    assert len(failed) == 1
    assert f"{tmp_path}: has no tokenizer.json" in failed[0]
    assert "slow tokenizer" in failed[0]
    assert "scripts/train_tokenizer.py" in failed[0]
    assert "1 failed" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocab.txt"]  # the cache was not created either


def test_a_full_disk_is_a_failed_check_and_leaves_nothing(tokenizer_path: Path, tmp_path: Path) -> None:
    limit = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, {resource.RLIM_INFINITY})); "
        f"sys.argv[0] = 'doctor'; "
    )
    code = (
        limit
        + "import os; from moai.doctor import main; main(sys.argv[1:], os.environ); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--tokenizer_path", str(tokenizer_path), "--cache_dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")  # 1 would say that torch was imported
    assert [line.split("  ")[0] for line in ran.stdout.splitlines() if f" {FAILED} " in line] == ["disk speed"]
    assert "File too large" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_packages_every_check_still_reports(tokenizer_path: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer_path", str(tokenizer_path), "--cache_dir", str(tmp_path)]
    command = [sys.executable, "-S", str(REPO / "verify_optimization.py"), *flags]  # -S: without site-packages
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")
    failed = [line.split("  ")[0] for line in ran.stdout.splitlines() if f" {FAILED} " in line]
    assert failed == ["tokenizer", "lock", "versions"]
    assert ran.stdout.count("bash scripts/bootstrap.sh") == 3


@pytest.mark.parametrize(
    ("arguments", "said"), [((), "--tokenizer_path"), (("--tokenizer_paht", "x"), "did you mean --tokenizer_path")]
)
def test_bad_usage_is_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    ran = doctor(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_an_absent_or_broken_tokenizer_fails_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "none"):
        (check,) = check_tokenizer(str(path))
        assert (check.name, check.verdict) == ("tokenizer", FAILED)
        assert str(path) in check.value
        assert "train_tokenizer.py" in check.remedy


def test_a_tokenizer_without_an_end_fails_as_preparation_would(tokenizer_path: Path, tmp_path: Path) -> None:
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((tokenizer_path / "tokenizer.json").read_bytes())
    (check,) = check_tokenizer(str(bare))
    assert check.verdict == FAILED
    assert "--eos_token" in check.remedy
    assert next(check.verdict for check in check_tokenizer(str(bare), eos_token="</s>")) == OK


def test_the_doctor_says_what_would_encode_and_why(tokenizer_path: Path, tmp_path: Path) -> None:
    from tokenizers import normalizers

    fast = next(check for check in check_tokenizer(str(tokenizer_path)) if check.name == "tokenizer backend")
    assert (fast.verdict, fast.figures) == (OK, {"backend": "fastokens"})
    composing = byte_level_bpe()
    composing.normalizer = normalizers.NFKC()
    slow = next(
        check
        for check in check_tokenizer(str(save(composing, tmp_path)), eos_token="</s>")
        if check.name == "tokenizer backend"
    )
    assert (slow.verdict, slow.figures) == (ADVICE, {"backend": "tokenizers"})
    assert "does not take this tokenizer" in slow.value


def test_a_tokenizer_that_folds_case_is_found_by_the_round_trip(tmp_path: Path) -> None:
    from tokenizers import normalizers

    folding = byte_level_bpe()
    folding.normalizer = normalizers.Lowercase()
    backend = Reference(spec=load_tokenizer(str(save(folding, tmp_path))))
    check = check_round_trip(backend, ["same\nDifferent\n첫 줄\n"])
    assert (check.verdict, check.figures) == (ADVICE, {"lines": 3, "changed": 1})
    assert "Different" in check.value


def test_the_sample_is_real_text_with_hangul(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (REPO / "data" / "demo").is_dir():
        assert sample()[1] == "the demo corpus"
    assert any("가" <= letter <= "힣" for document in sample()[0][:10] for letter in document)
    monkeypatch.setattr("moai.doctor.tokenization._DEMO", tmp_path)
    documents, origin = sample()
    assert origin == "built-in sentences"
    assert any("가" <= letter <= "힣" for letter in "".join(documents[:10]))


class Elsewhere(filesystem.SecondProcess):
    """A second process on a mount that shares nothing with ours: what it locks and sees is another file."""

    def ask(self, verb: str, path: Path) -> bool:
        return super().ask(verb, path.with_name("elsewhere"))


def test_a_mount_without_locks_is_found(tmp_path: Path) -> None:
    with filesystem.second_process() as other:
        blind = Elsewhere(other._process, other._connection)
        check = filesystem.check_lock(tmp_path, blind)
    assert check.verdict == FAILED
    assert "took a lock that was held" in check.value


def test_a_view_that_never_catches_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "VISIBLE_SECONDS", 0.1)
    with filesystem.second_process() as other:
        check = filesystem.check_rename(tmp_path, Elsewhere(other._process, other._connection))
    assert check.verdict == FAILED
    assert "does not see" in check.value


def test_a_second_process_that_ends_is_a_failed_check_not_a_traceback(tmp_path: Path) -> None:
    with filesystem.second_process() as other:
        other.kill()
        check = filesystem._attempt("lock", lambda: filesystem.check_lock(tmp_path, other))
    assert (check.name, check.verdict) == ("lock", FAILED)


def test_a_file_system_without_links_costs_space_not_correctness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # no file system without links can be mounted here
    with filesystem.second_process() as other:
        check = filesystem.check_rename(tmp_path, other)
    assert check.verdict == ADVICE
    assert "copied" in check.remedy


@pytest.mark.parametrize(
    ("name", "text", "on", "verdict", "recommended"),
    [
        ("DATASET_NUM_PROC", "48", machine(48, 200), OK, 48),
        ("DATASET_NUM_PROC", "48", machine(2, 16), ADVICE, 2),
        ("DATASET_NUM_PROC", "48", machine(48, 10), ADVICE, 6),
        ("DATASET_NUM_PROC", "0", machine(2, 16), OK, 2),
        ("DATASET_NUM_PROC", "many", machine(2, 16), FAILED, 2),
        ("RAYON_NUM_THREADS", "48", machine(2, 16), ADVICE, 2),
        ("RAYON_NUM_THREADS", "1", machine(2, 16), OK, 2),
        ("RAYON_NUM_THREADS", "many", machine(2, 16), ADVICE, 2),
        ("OMP_NUM_THREADS", "", machine(2, 16), ADVICE, 2),
        ("OMP_NUM_THREADS", "", machine(1, 16), OK, 1),
        ("OMP_NUM_THREADS", "1", machine(2, 16), ADVICE, 2),
        ("OMP_NUM_THREADS", "2", machine(2, 16), OK, 2),
        ("DATASET_BATCH_SIZE", "0", machine(2, 16), FAILED, 512),
        ("DATASET_BATCH_SIZE", "20000", machine(2, 16), OK, 512),
        ("DATASET_WRITER_BATCH_SIZE", "100000", machine(2, 16), OK, 24000),
        ("DATASET_WRITER_BATCH_SIZE", "100000000", machine(2, 16), ADVICE, 24000),
        ("TOKENIZERS_PARALLELISM", "False", machine(2, 16), ADVICE, "true"),
        ("TOKENIZERS_PARALLELISM", "true", machine(2, 16), OK, "true"),
        ("ARROW_DEFAULT_MEMORY_POOL", "tcmalloc", machine(2, 16), ADVICE, "mimalloc"),
        ("ARROW_DEFAULT_MEMORY_POOL", "system", machine(2, 16), OK, "mimalloc"),
        ("ARROW_IO_THREADS", "8", machine(2, 16), OK, 2),
        ("ARROW_IO_THREADS", "64", machine(2, 16), ADVICE, 2),
    ],
)
def test_a_variable_is_judged_against_this_machine(
    name: str, text: str, on: Machine, verdict: str, recommended: object
) -> None:
    (check,) = [check for check in environment.check_environment(on, {name: text}) if check.name == name]
    assert (check.verdict, check.figures["recommended"]) == (verdict, recommended)


def test_omp_threads_are_judged_against_a_rank_s_share() -> None:
    environ = {"NUM_GPUS": "4", "OMP_NUM_THREADS": "8"}
    (check,) = [
        check for check in environment.check_environment(machine(8, 64), environ) if check.name == "OMP_NUM_THREADS"
    ]
    assert (check.verdict, check.figures["recommended"]) == (ADVICE, 2)


def test_what_optimize_env_sets_is_never_advised_against() -> None:
    for on in (machine(1, 4), machine(2, 16), machine(48, 30), machine(96, 500)):
        environ = {name: str(setting.value) for name, setting in exports(on, {}).items()}
        assert [check for check in environment.check_environment(on, environ) if check.verdict != OK] == []
        assert environment.check_cores(on, environ).verdict == OK


def test_memory_for_fewer_workers_is_advice_and_for_none_a_failure() -> None:
    assert environment.check_memory(machine(2, 16), {}).verdict == OK
    few = environment.check_memory(machine(96, 30), {})
    assert (few.verdict, few.figures["num_proc"]) == (ADVICE, 37)
    assert environment.check_memory(machine(2, 0.3), {}).verdict == FAILED


def test_a_missing_or_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_versions().verdict == OK
    monkeypatch.setattr(environment, "_requirements", lambda: {"moai-no-such-package": "0", "numpy": "999.1"})
    check = environment.check_versions()
    assert check.verdict == FAILED
    assert "moai-no-such-package is missing" in check.value
    assert "is older than 999.1" in check.value


def test_the_rating_comes_from_measured_speed() -> None:
    checks = [
        Check(name="tokenizer", value="fast"),
        Check(name="tokenizer speed", value="", figures={"mb_per_second": 3.0}),
        Check(name="cores", value="", figures={"cpus": 48}),
        Check(name="memory", value="", figures={"memory_mode": "memory", "num_proc": 48}),
        Check(name="disk speed", value="", figures={"write_mb_per_second": 900}),
        Check(name="OMP_NUM_THREADS", value="12", figures={"recommended": 12}),
    ]
    said = "\n".join(summarize(checks))
    assert "Score: 5 of 5, excellent" in said
    assert "36,000 examples/s of 4 KB: very fast" in said  # 48 x 3 MB/s / 4 KB
    assert "would take 3 min" in said
    slow = [Check(name="tokenizer", value="none", verdict=FAILED, remedy="get one"), *checks[2:]]
    assert "Score: 4 of 5, good" in summarize(slow)[0]
    assert "examples/s" not in "".join(summarize(slow))
