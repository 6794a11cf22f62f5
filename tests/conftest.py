"""What several test files stand on: the shipped tokenizer, preparation in this process, the command line in another."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import crashes
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from s3_server import Server, serving

from moai import cli
from moai.core import stores
from moai.engine.executor import Cluster
from moai.prepared.manifest import Prepared
from moai.pretraining import recipe as pretraining
from moai.pretraining.options import DataConfig
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: what is ignored here would be ignored in every child, and no Ctrl-C could be
    # tried.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if (
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
):  # likewise by nohup; what is handled here is not ignored there, and the tests go on without a terminal
    signal.signal(signal.SIGHUP, lambda *_: None)


ROOT = Path(__file__).parent.parent
_THE_USERS = (ROOT / "outputs", Path.home() / ".cache" / "moai")
"""What belongs to whoever runs the tests, and is neither read nor written by one."""
_PLACE = pytest.StashKey[Path]()
_TOUCHING = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "shutil.rmtree",
    "sqlite3.connect",
}
_STARTING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
_SET_BY_THE_USER = ("MOAI_CACHE_DIR", "OUTPUT_DIR", "CACHE_DIR", "MAX_STEPS", "HF_HOME", "XDG_CACHE_HOME")

settings.register_profile(
    "moai",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("quick", settings.get_profile("moai"), max_examples=10)
settings.load_profile("moai")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip what starts another process or loads much")


def pytest_configure(config: pytest.Config) -> None:
    """A home and a folder of their own for the tests and all that they start; and in this process a guard before what
    is the user's.

    The folder that pytest would take is shared by all its sessions of a user, who trip over one another when they tidy
    it up.
    """
    for name in _SET_BY_THE_USER:
        os.environ.pop(name, None)
    place = Path(tempfile.mkdtemp(prefix="moai-tests-"))
    config.stash[_PLACE] = place
    for name in ("HOME", "PYTEST_DEBUG_TEMPROOT"):
        folder = place / name.lower()
        folder.mkdir()
        os.environ[name] = str(folder)
    sys.addaudithook(stay_out)
    if config.getoption("--quick"):
        settings.load_profile("quick")
        sys.addaudithook(stay_quick)
        util.spawnv_passfds = stay_alone  # which tells no audit hook


def stay_quick(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends a test that is not quick where it shows, so that none must say of itself which it is."""
    if event in _STARTING:
        stay_alone()
    if event == "import" and arguments[0] in ("torch", "kiwipiepy"):
        raise pytest.skip.Exception("--quick: imports torch or Kiwi", allow_module_level=True)


def stay_alone(*_: Any) -> NoReturn:
    raise pytest.skip.Exception("--quick: starts another process", allow_module_level=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """What failed can be looked at."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.config.add_cleanup(lambda: shutil.rmtree(session.config.stash[_PLACE], ignore_errors=True))


def stay_out(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises AssertionError in the test that looks at what is the user's. Of other processes test_a_trained_clone.py
    sees what they change.
    """
    if event in _TOUCHING and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(arguments[0])
        # os.open says no mode, and not whether a name is relative to the working directory or, as in rmtree, to a
        # descriptor.
        by_descriptor = (
            arguments[1] is None if event == "open" else isinstance(arguments[-1], int) and arguments[-1] >= 0
        )
        if not ("outputs" in path or ".cache" in path) or (by_descriptor and not os.path.isabs(path)):
            return
        if any(Path(os.path.abspath(path)).is_relative_to(place) for place in _THE_USERS):
            raise AssertionError(f"a test touches {path} ({event}), which is the user's: give it a place in tmp_path")


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """The shipped byte-level tokenizer: 8,192 ids, and every text comes back from its tokens."""
    return ROOT / "tokenizers" / "demo"


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Prepared]:
    """`prepare(path, ..., seq_len=64)`: prepare in this process, in a cache of this test unless `cache_dir` names
    another.

    Without `packing` a row is a document, so that `texts` gives the documents back.
    """

    def run(*dataset: Any, **changes: Any) -> Prepared:
        given = {
            "tokenizer_path": str(tokenizer_dir),
            "seq_len": 4096,
            "num_proc": 0,
            "cache_dir": str(tmp_path / "cache"),
            **changes,
        }
        prepared = pretraining.prepare(DataConfig(dataset=dataset, **given), origins={"num_proc": "flag"})
        # As if by a process that has ended: this one would be taken to use what it prepared as long as the tests run.
        shutil.rmtree(Path(given["cache_dir"]) / "uses", ignore_errors=True)
        return prepared

    return run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The one that `prepare` prepares into."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input of tests/crashes.py."""
    return crashes.write_corpus(tmp_path_factory.mktemp("crashes") / "data")


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `corpus` is prepared to where nothing is in the way."""
    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert crashes.run(corpus, cache, "serial").codes == [0]
    return crashes.content(cache)


@pytest.fixture(scope="session")
def texts(tokenizer_dir: Path) -> Callable[[Prepared], list[str]]:
    """The documents of what was prepared without packing, in order, decoded."""
    spec = load_tokenizer(str(tokenizer_dir))
    backend = Reference(spec=spec)

    def read(prepared: Prepared) -> list[str]:
        rows = [row for path in sorted(prepared.path.glob("data-*.arrow")) for row in _rows(path)]
        assert all(row[-1] == spec.eos_id for row in rows)
        return [backend.decode(row[:-1]) for row in rows]

    return read


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A private Ray of two CPUs on loopback, started once for all tests. Whatever asks for Ray in this process finds
    it.
    """
    with Cluster(shared=tmp_path_factory.mktemp("ray")) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A store on loopback; its buckets are folders of `server.folder`."""
    with serving(tmp_path / "buckets") as one:
        for name, value in one.environ.items():
            monkeypatch.setenv(name, value)
        stores._store.cache_clear()
        yield one
    stores._store.cache_clear()


@pytest.fixture(scope="session")
def run_moai() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_moai("prepare", "--dataset", ...)` as a person would, but in this process."""

    def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        out, said, root = io.StringIO(), io.StringIO(), logging.getLogger()
        handler, level = logging.StreamHandler(said), root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        with redirect_stdout(out), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                code = cli.main([*map(str, words)])
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                root.removeHandler(handler)
                root.setLevel(level)
        return subprocess.CompletedProcess(words, code, out.getvalue(), said.getvalue())

    return run


@pytest.fixture(scope="session")
def start_moai() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_moai` in a process of its own."""

    def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moai", *map(str, words)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **(env or {})}
        )

    return run


def _rows(path: Path) -> list[list[int]]:
    with pa.memory_map(str(path)) as file:
        return [row for batch in pa.ipc.open_stream(file) for row in batch["input_ids"].to_pylist()]


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """`record("fault", runs, "outcome")`: a row for the table of docs/reliability.md, kept where MOAI_RECORD names a
    file (tests/reliability.py).
    """

    def note(fault: str, runs: int, outcome: str) -> None:
        if os.environ.get("MOAI_RECORD"):
            with open(os.environ["MOAI_RECORD"], "a", encoding="utf-8") as file:
                file.write(
                    json.dumps(
                        {
                            "fault": fault,
                            "test": os.environ["PYTEST_CURRENT_TEST"].split(" ")[0],
                            "runs": runs,
                            "outcome": outcome,
                        }
                    )
                    + "\n"
                )

    return note


@pytest.fixture
def train_py(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """train.py with these words in this process, from the root of the repository; what it logs."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "moai.training.logs.start_logging", lambda output_dir, _: output_dir.mkdir(parents=True, exist_ok=True)
    )  # pytest logs
    monkeypatch.setattr("moai.training.trainer.quiet_libraries", lambda: None)
    caplog.set_level(logging.INFO, "moai")

    def run(*words: str) -> str:
        import train

        caplog.clear()
        train.run(words, {})
        return caplog.text

    return run
