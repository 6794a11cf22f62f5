"""The shell scripts: syntax, bash 3.2, what bootstrap.sh makes and when, and the wrappers with real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    p
    for p in [*REPO.glob("*.sh"), *REPO.glob("scripts/*.sh"), *REPO.glob("tests/*.sh"), REPO / ".ci/run"]
    if p.is_file()
)
SOURCED = {"optimize_env.sh", "launch.sh"}

# What bash 3.2 (macOS) does not know, each with a line that has it.
NEWER_THAN_3_2 = {
    r"\b(declare|local|typeset)\s+-\w*[An]": "declare -A sizes",
    r"\b(mapfile|readarray)\b": "mapfile -t lines",
    r"\$\{\w+(,,?|\^\^?)": "echo ${name,,}",
    r"\$\{\w+@\w\}": "echo ${name@Q}",
    r"\|&": "make |& tee log",
    r"&>>": "make &>> log",
    r";;?&": "a) ;;&",
    r"\bcoproc\b": "coproc cat",
    r"\[\[?\s+-v\s": "[ -v name ]",
    r"\bprintf\s+(-v \w+ )?['\"][^'\"]*%\(": "printf '%(%T)T'",
    r"\bwait\s+-n\b": "wait -n",
    r"\$\{\w+\[-\d+\]": "echo ${list[-1]}",
    r"\bexec\s+\{\w+\}": "exec {fd}>lock",
    r"\bglobstar\b|\blastpipe\b": "shopt -s globstar",
    r"\$\{\w+:\s*-?\d+:\s*-\d+\}": "echo ${name:0:-1}",
    r"\$(EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM)\b": "echo $EPOCHSECONDS",
}


def newer_constructs(source: str) -> list[str]:
    code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))
    return [pattern for pattern in NEWER_THAN_3_2 if re.search(pattern, code)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_is_executable_and_knows_only_bash_3_2(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert newer_constructs(script.read_text()) == []
    assert os.access(script, os.X_OK) != (script.name in SOURCED), (
        "what is run must be executable, what is sourced must not be"
    )


@pytest.mark.parametrize(("pattern", "line"), NEWER_THAN_3_2.items())
def test_the_check_for_newer_constructs_sees_each(pattern: str, line: str) -> None:
    assert newer_constructs(f"set -eu\n{line}\n") == [pattern]
    assert newer_constructs(f"# {line}\n") == []


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in SOURCED | {"run"}], ids=lambda p: p.name)
def test_help_is_the_comment_at_the_head(script: Path) -> None:
    said = subprocess.run([str(script), "--help"], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[0] == script.read_text().splitlines()[1].removeprefix("# ")
    assert "set -eu" not in said


# --- bootstrap.sh, on a project of its own that installs without a network --------------------------------------------


_BACKEND = """
import base64, hashlib, os, zipfile

def _wheel(directory, name, files):
    record = f"{name}-1.dist-info/RECORD"
    files = {**files, f"{name}-1.dist-info/METADATA": f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n",
             f"{name}-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    with zipfile.ZipFile(os.path.join(directory, f"{name}-1-py3-none-any.whl"), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(record, "".join(f"{path},,\\n" for path in [*files, record]))
    return f"{name}-1-py3-none-any.whl"

def build_wheel(directory, settings=None, metadata=None):
    name = os.path.basename(os.getcwd())
    return _wheel(directory, name, {f"{name}.py": ""})

def build_editable(directory, settings=None, metadata=None):
    return _wheel(directory, "project", {"project.pth": os.getcwd()})
"""
_PYPROJECT = (
    '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "{}"\n'
    'version = "1"\n'
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real bootstrap.sh and two tiny packages to pin, built by a back end of their own."""
    root = tmp_path_factory.mktemp("made by bootstrap") / "project"
    for folder, name in (
        (root, "project"),
        (root.parent / "packages/one", "one"),
        (root.parent / "packages/two", "two"),
    ):
        folder.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(_PYPROJECT.format(name))
        (folder / "backend.py").write_text(_BACKEND)
    (root / "scripts").mkdir()
    shutil.copy(REPO / "scripts/bootstrap.sh", root / "scripts")
    pin(root, "one")
    return root


def pin(root: Path, *names: str) -> None:
    (root / "requirements.txt").write_text("".join(f"{root.parent.as_uri()}/packages/{name}\n" for name in names))


def bootstrap(root: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environ}
    return subprocess.run([str(root / "scripts/bootstrap.sh")], env=env, capture_output=True, text=True, check=False)


def packages(root: Path) -> set[str]:
    listing = subprocess.run(
        [root / ".venv/bin/python", "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    ).stdout
    return {package["name"] for package in json.loads(listing)} & {"one", "two", "project"}


def test_bootstrap_makes_venv_once_and_again_when_the_pins_change(project: Path) -> None:
    first = bootstrap(project)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stderr
    assert packages(project) == {"one", "project"}

    again = bootstrap(project, PYTHON="/no/such")
    assert (again.returncode, again.stderr) == (0, ""), "what is current is neither looked into nor in need of a Python"

    pin(project, "one", "two")
    changed = bootstrap(project)
    assert changed.returncode == 0, changed.stderr
    assert "making .venv" not in changed.stderr, "changed pins are installed into the .venv that is there"
    assert packages(project) == {"one", "two", "project"}

    # A killed install has taken the stamp away before it began and not written it again.
    (project / ".venv/.bootstrap.stamp").unlink()
    subprocess.run([project / ".venv/bin/python", "-m", "pip", "uninstall", "--yes", "--quiet", "two"], check=True)
    redone = bootstrap(project)
    assert redone.returncode == 0, redone.stderr
    assert packages(project) == {"one", "two", "project"}

    # A failed one leaves no stamp, so that the next start tries again.
    pin(project, "absent")
    failed = bootstrap(project)
    assert failed.returncode == 2
    assert "bootstrap: pip could not install" in failed.stderr
    assert not (project / ".venv/.bootstrap.stamp").exists()
    pin(project, "one", "two")

    # Two starts at once: one installs, the other waits for it.
    waiting = [
        subprocess.Popen(
            [project / "scripts/bootstrap.sh"],
            env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], said
    assert sum("is ready" in text for text in said) == 1, said

    # The scripts of a moved .venv point to its old place.
    moved = project.rename(project.with_name("moved"))
    elsewhere = bootstrap(moved)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "making .venv" in elsewhere.stderr
    assert str(moved) in (moved / ".venv/bin/pip").read_text()


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with the few programs bootstrap.sh calls and no Python; add one with `fake_python`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("bash", "env", "cat", "dirname", "find", "mkdir", "mv", "rm", "sed"):
        (folder / program).symlink_to(str(shutil.which(program)))
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts/bootstrap.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("")
    return folder


def fake_python(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!{folder}/bash\n{script}\n")
    (folder / name).chmod(0o755)


OLD = "echo 3.9.2; exit 1"
WITHOUT = '[[ $2 == *"import {}"* ]] && exit 1; echo 3.12.1'


@pytest.mark.parametrize(
    ("fakes", "named", "says"),
    [
        ({}, "", "Python 3.11 or newer is missing (tried python3.11, python3.12, python3.13, python3)"),
        (
            {"python3": OLD},
            "",
            "Python 3.11 or newer is missing (tried python3.11, python3.12, python3.13, python3; python3 is 3.9.2)",
        ),
        ({"old": OLD}, "old", "PYTHON=old: is Python 3.9.2, not a Python 3.11 or newer"),
        ({}, "/no/such", "PYTHON=/no/such: not a Python 3.11 or newer"),
        (
            {"python3": OLD, "python3.12": WITHOUT.format("venv")},
            "",
            "the venv module of python3.12 is missing (Debian, Ubuntu: apt install python3-venv)",
        ),
        (
            {"python3": WITHOUT.format("ensurepip")},
            "",
            "pip for new environments (the ensurepip module of python3) is missing",
        ),
    ],
)
def test_bootstrap_says_in_one_line_what_is_missing(
    bare_path: Path, fakes: Mapping[str, str], named: str, says: str
) -> None:
    for name, script in fakes.items():
        fake_python(bare_path, name, script)
    run = bootstrap(bare_path.parent, PATH=str(bare_path), PYTHON=named)
    assert run.returncode == 2
    assert says in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (bare_path.parent / ".venv").exists()


def test_a_venv_of_another_user_is_one_sentence(bare_path: Path) -> None:
    """Its python is there, but not for this user. Root, whom no permission stops, tries as another."""
    root = bare_path.parent
    fake_python(bare_path, "python3", "echo 3.12.1")
    (root / ".venv").mkdir()
    (root / ".venv/.bootstrap.lock").touch()
    root.joinpath(".venv").chmod(0o555)
    for folder in (root, *root.parents):
        if os.geteuid() == 0 and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    run = subprocess.run(
        [str(root / "scripts/bootstrap.sh")], env={"PATH": str(bare_path)}, capture_output=True, text=True, **other
    )
    assert run.returncode == 2
    assert run.stderr == (
        f"bootstrap: {root}/.venv is not ready for this user, who may not write into it; use a clone of your own, or "
        f"remove .venv and start again\n"
    )


# --- pretrain.sh and pretrain_cont.sh, with real ranks ----------------------------------------------------------------


_TRAIN = """
import json, os, signal, sys, time
from accelerate import PartialState
import torch
state = PartialState(cpu=True)
total = torch.tensor([float(state.process_index + 1)])
if state.num_processes > 1:
    torch.distributed.all_reduce(total)
seen = {"rank": state.process_index, "world": state.num_processes, "total": total.item(), "argv": sys.argv[1:],
        "pid": os.getpid(),
        "precision": os.environ.get("ACCELERATE_MIXED_PRECISION"), "num_proc": os.environ.get("DATASET_NUM_PROC"),
        "hf_home": os.environ["HF_HOME"]}
with open(f"rank{state.process_index}.tmp", "w") as file:
    json.dump(seen, file)
os.rename(file.name, f"rank{state.process_index}.json")
while os.environ.get("UNTIL_KILLED"):
    time.sleep(0.1)
os._exit(0)  # at an ordinary exit gloo of torch 2.13 aborts now and then: its threads want Python objects that are gone
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project as the wrappers see it, around a train.py that says what it was given. Its .venv counts as
    installed.
    """
    for name in ("pretrain.sh", "pretrain_cont.sh", "optimize_env.sh"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("scripts", "configs"):
        shutil.copytree(REPO / name, tmp_path / name)
    for name in ("moai", "data", "tokenizers"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "train.py").write_text(_TRAIN)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, words in (("python", ""), ("accelerate", "-m accelerate.commands.accelerate_cli")):
        fake = tmp_path / ".venv/bin" / name
        fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        fake.chmod(0o755)
    (tmp_path / ".venv/.bootstrap.stamp").write_text(f"{tmp_path}\n")
    # What `accelerate config` may have left for other work must not change the ranks.
    home = tmp_path / "hf/accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\ngpu_ids: '0'\n"
        "machine_rank: 1\nnum_machines: 3\n"
        "num_processes: 12\nmain_process_ip: 192.0.2.1\nmain_process_port: 1\nmixed_precision: bf16\nrdzv_backend: "
        "c10d\nuse_cpu: true\ndebug: false\n"
    )
    return tmp_path


def environment(root: Path, **more: str) -> dict[str, str]:
    ours = "NUM_GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPU_MEMORY OUTPUT_DIR CACHE_DIR MAX_STEPS RANK WORLD_SIZE"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours.split(" ") and not name.startswith("DATASET_")
    }
    return {**kept, "HF_HOME": str(root / "hf"), "PYTHONPATH": "", **more}


def wrapper(root: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / words[0]), *words[1:]],
        cwd=root,
        env=environment(root, **environ),
        capture_output=True,
        text=True,
        check=False,
    )


def ranks(root: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(root.glob("rank*.json"))]


def test_pretrain_starts_two_ranks_on_a_machine_without_gpu(checkout: Path) -> None:
    run = wrapper(
        checkout, "pretrain.sh", CUDA_VISIBLE_DEVICES="", MAX_STEPS="7", OUTPUT_DIR="out put", DATASET_NUM_PROC="3"
    )
    assert run.returncode == 0, run.stderr
    seen = ranks(checkout)
    assert [(rank["rank"], rank["world"], rank["total"], rank["precision"], rank["num_proc"]) for rank in seen] == [
        (0, 2, 3.0, "no", "3"),
        (1, 2, 3.0, "no", "3"),
    ]
    words = ["--mode", "pretrain", "--config", "configs/demo.yaml", "--output_dir", "out put"]
    words += ["--max_steps", "7", "--use_cpu", "true"]
    assert [rank["argv"] for rank in seen] == [words, words]


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_nohup_and_signals_to_the_wrapper_reach_every_rank(checkout: Path, stop: signal.Signals) -> None:
    """The mask of ignored signals is the kernel's; torch's agent takes SIGHUP from under nohup unless it is told not
    to.
    """
    command = ["sh", "-c", "trap '' HUP; exec ./pretrain.sh"]
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment(checkout, CUDA_VISIBLE_DEVICES="", UNTIL_KILLED="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while len(ranks(checkout)) < 2:
            assert process.poll() is None, "ended before its ranks began"
            time.sleep(0.05)
        for pid in (process.pid, *(rank["pid"] for rank in ranks(checkout))):
            ignored = int(re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16)
            assert ignored & 1 << signal.SIGHUP - 1
        process.send_signal(stop)
        assert process.wait(timeout=600) != 0
        for rank in ranks(checkout):
            with pytest.raises(ProcessLookupError):
                os.kill(int(str(rank["pid"])), 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_continued_pretraining_takes_old_weights_and_next_data(checkout: Path) -> None:
    without = wrapper(checkout, "pretrain_cont.sh")
    assert (without.returncode, len(without.stderr.splitlines())) == (2, 1)
    assert "train it first: ./pretrain.sh demo" in without.stderr
    (checkout / "outputs/demo/final_model").mkdir(parents=True)
    run = wrapper(checkout, "pretrain_cont.sh", "demo", "--seed", "5", NUM_GPUS="1")
    assert run.returncode == 0, run.stderr
    assert ranks(checkout)[0]["argv"] == ["--mode", "pretrain", "--config", "configs/demo_cont.yaml", "--seed", "5"]
    assert "data/demo_next" in run.stderr
    assert "outputs/demo/final_model" in run.stderr


def test_resume_is_the_same_run_with_its_newest_checkpoint(checkout: Path) -> None:
    without = wrapper(checkout, "pretrain_cont.sh", "demo", "--resume")
    assert (without.returncode, len(without.stderr.splitlines())) == (2, 1)
    assert "outputs/demo: no checkpoint to resume from; start the run first: ./pretrain.sh demo" in without.stderr
    (checkout / "outputs/demo/checkpoint-40").mkdir(parents=True)
    run = wrapper(checkout, "pretrain_cont.sh", "--resume", "--seed", "5", NUM_GPUS="1")
    assert run.returncode == 0, run.stderr
    words = "--mode pretrain --config configs/demo.yaml --resume_from_checkpoint auto --seed 5"
    assert ranks(checkout)[0]["argv"] == words.split()


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        (("pretrain.sh", "3b"), {}, "3b: neither one of demo, 2b, 5b nor a configuration file"),
        (("pretrain.sh", "demo", "--sequence_len", "4"), {}, "did you mean --seq_len?"),
        (("pretrain.sh", "--seq_len", "x"), {}, "--seq_len: 'x' is not a whole number"),
        (("pretrain.sh",), {"NUM_GPUS": "two"}, "NUM_GPUS='two': must be a whole number of at least 1"),
        (("pretrain.sh",), {"NNODES": "2"}, "MASTER_ADDR=HOST"),
        (("pretrain.sh",), {"MAX_STEPS": "many"}, "MAX_STEPS='many'"),
        (("pretrain.sh", "2b"), {"GPU_MEMORY": "24"}, "GPU_MEMORY=24: known are 32, 48, 80"),
        (
            ("pretrain_cont.sh", "2b"),
            {},
            "outputs/moai-2b/final_model: no trained model to go on from; train it first: ./pretrain.sh 2b",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_starts_nothing(
    checkout: Path, words: tuple[str, ...], environ: Mapping[str, str], says: str
) -> None:
    run = wrapper(checkout, *words, **environ)
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
    assert says in run.stderr
    assert ranks(checkout) == []
