"""Preparation through tokenizer backends: the same bytes whichever encodes, and what one that is wrong leaves behind:
nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizer_shapes import ROOT, Shape

from moai.cache.ledger import Ledger
from moai.engine.pipeline import Receipt, count
from moai.prepared.manifest import Prepared, write_manifest
from moai.pretraining import recipe as pretraining
from moai.pretraining import tokenizer_backend as choosing
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import distrusted
from moai.tokenizers.backends import BACKENDS, Fastokens, Ids, Offsets, _loaded
from moai.tokenizers.load import load_tokenizer

SHARD_BYTES = 150_000
EOS = "<|endoftext|>"
SAID = f"A text about {EOS} and <|begin_of_text|>, {EOS}{EOS} in the middle, 그리고 {EOS} 끝."


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make(data: Path, tokenizer: Path, cache: Path, **changes: Any) -> Prepared:
    given = {"seq_len": 128, "packing": "bfd_split", "shard_bytes": SHARD_BYTES, "num_proc": 0, **changes}
    config = DataConfig(dataset=(str(data),), tokenizer_path=str(tokenizer), cache_dir=str(cache), **given)
    return pretraining.prepare(config, origins={"num_proc": "flag"})


def sha256(prepared: Prepared) -> tuple[str, str]:
    digest = hashlib.sha256()
    for path in sorted(prepared.path.glob("data-*.arrow")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest(), prepared.content_digest


def receipts(prepared: Prepared) -> list[Receipt]:
    ledger = Ledger(prepared.path.parent.parent)
    found = [ledger.receipt(shard["shard_key"]) for shard in prepared.content["shards"]]
    assert found
    assert None not in found
    return [receipt for receipt in found if receipt]


def made_by(prepared: Prepared) -> list[str]:
    """Whom the receipts name, and the manifest with them."""
    names = sorted({f"{receipt.made_by['tokenizer']} {receipt.made_by['version']}" for receipt in receipts(prepared)})
    assert prepared.manifest["run"]["tokenizer_backends"] == names
    return names


def refused(prepared: Prepared) -> int:
    return sum(receipt.counts.get("backend.refused", 0) for receipt in receipts(prepared))


# ---- the same bytes, whoever encodes


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """Some of every shipped language, special tokens in the text, a long document: five shards."""
    return write(
        tmp_path_factory.mktemp("mixed") / "mixed.jsonl", [*documents[::7], SAID, " " * 5000, "".join(documents[:8])]
    )


PLAIN: list[tuple[str, int]] = [("tokenizers", 0), ("tokenizers", 2), ("auto", 0), ("auto", 2), ("fastokens", 0)]
ODD: list[tuple[str, int]] = [("tokenizers", 0), ("auto", 0), ("fastokens", 2)]


@pytest.mark.parametrize(
    ("name", "options", "ways"),
    [("llama3", {}, PLAIN), ("qwen2", {"add_bos": True}, ODD), ("llama3", {"split_special_tokens": True}, ODD)],
)
def test_bytes_are_equal_across_backends_and_workers(
    shape: Shape,
    mixed: Path,
    tmp_path: Path,
    log: Any,
    name: str,
    options: dict[str, bool],
    ways: list[tuple[str, int]],
) -> None:
    found = {}
    for backend, num_proc in ways:
        log.clear()
        prepared = make(
            mixed,
            shape(name),
            tmp_path / f"{backend}-{num_proc}",
            tokenizer_backend=backend,
            num_proc=num_proc,
            **options,
        )
        found[backend, num_proc] = sha256(prepared)
        used = {"auto": "fastokens"}.get(backend, backend)
        assert [made.split()[0] for made in made_by(prepared)] == [used]
        said = next(message for message in log.messages if "tokenizer backend = " in message)
        assert f"tokenizer backend = {used} " in said
        assert prepared.content["token_counts"].get("special_in_text", 0) == (
            0 if "split_special_tokens" in options else 5
        )
        assert len(prepared.content["shards"]) >= 5
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize(("name", "backend"), [("wordpiece", "auto"), ("unigram", "fastokens")])
def test_a_tokenizer_that_no_fast_backend_takes_just_works(
    shape: Shape, mixed: Path, tmp_path: Path, log: Any, name: str, backend: str
) -> None:  # fmt: skip
    plain = make(mixed, shape(name), tmp_path / "a", tokenizer_backend="tokenizers")
    log.clear()
    prepared = make(mixed, shape(name), tmp_path / "b", tokenizer_backend=backend)
    assert sha256(prepared) == sha256(plain)
    assert made_by(prepared) == [f"tokenizers {version('tokenizers')}"]
    assert "does not take this tokenizer: " in log.text


def test_a_text_that_the_fast_backend_refuses_goes_to_the_reference_alone(shape: Shape, tmp_path: Path) -> None:
    texts = (
        [f"before {number}" for number in range(10)]
        + ["x" + " " * 1_000_000 + "y"]
        + [f"behind {number}, 뒤" for number in range(20)]
    )
    data = write(tmp_path / "data.jsonl", texts)
    tokenizer = shape("add_prefix_space")
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        Fastokens(spec=load_tokenizer(str(tokenizer))).encode_batch(texts)
    prepared = make(data, tokenizer, tmp_path / "fast", shard_bytes=2_000_000)
    assert sha256(prepared) == sha256(
        make(data, tokenizer, tmp_path / "slow", shard_bytes=2_000_000, tokenizer_backend="tokenizers")
    )
    assert made_by(prepared) == [f"fastokens {version('fastokens')}"]
    assert refused(prepared) == 1
    assert prepared.content["documents"] == len(texts)


def test_a_text_of_letters_on_which_it_parts_from_the_reference_is_refused(tmp_path: Path) -> None:
    """U+180E was white space until Unicode 6.3, and is for the Split of fastokens: with the shipped tokenizer its ids
    differ there.
    """
    data = write(tmp_path / "data.jsonl", ["plain"] * 50 + ["Mongolian  \u180eabc \u180ex"] + ["behind"] * 50)
    prepared = make(data, ROOT / "tokenizers" / "demo", tmp_path / "fast")
    assert sha256(prepared) == sha256(
        make(data, ROOT / "tokenizers" / "demo", tmp_path / "slow", tokenizer_backend="tokenizers")
    )
    assert made_by(prepared) == [f"fastokens {version('fastokens')}"]
    assert refused(prepared) >= 1


# ---- a backend that is wrong


def test_a_real_wrong_backend_is_found_before_the_first_shard(
    shape: Shape, mixed: Path, tmp_path: Path, log: Any
) -> None:
    prepared = make(mixed, shape("added twice"), tmp_path / "a")
    assert f"fastokens {version('fastokens')} gave other ids than tokenizers (" in log.text
    assert made_by(prepared) == [f"tokenizers {version('tokenizers')}"]
    assert sha256(prepared) == sha256(make(mixed, shape("added twice"), tmp_path / "b", tokenizer_backend="tokenizers"))


class Liar(Fastokens):
    """fastokens, but for texts with a certain word, whose last id is another one."""

    word = "외계인"

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        ids, offsets = super().encode_batch(texts)
        ids = ids.copy()
        for text, end in zip(texts, offsets[1:].tolist()):
            if self.word in text:
                ids[end - 1] ^= 1
        return ids, offsets


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fastokens", Liar)
    monkeypatch.setattr(pretraining, "choose", choose_a_liar)


def choose_a_liar(*given: Any) -> choosing.Chosen:
    """Where workers are forked from, nobody has heard of it yet."""
    BACKENDS["fastokens"] = Liar
    return choosing.choose(*given)


def sentences(start: int, count_: int) -> list[str]:
    return [
        f"문장 {number}: the quick brown fox jumps over {number * 7919} lazy dogs, 그리고 돌아온다." * 8
        for number in range(start, start + count_)
    ]


@dataclass(frozen=True)
class Lies:
    """`quiet`: one lie in the fifth shard, where nobody looks. The others: the same file, and one that is nothing but
    lies, within the sample or not.
    """

    quiet: Path
    sampled: Path
    loud: Path


@pytest.fixture(scope="session")
def lies(tmp_path_factory: pytest.TempPathFactory) -> Lies:
    from stamps import wait_until_stamps_prove  # imports what no worker should

    root = tmp_path_factory.mktemp("lies")
    texts = sentences(0, 1000)
    texts[907] += f" {Liar.word}"
    all_lies = [f"{text} {Liar.word}" for text in sentences(3000, 300)]
    files = {
        "quiet": {"a": texts},
        "sampled": {"a": texts, "b": all_lies},
        "loud": {"a": texts, "b": sentences(2000, 300), "c": sentences(2500, 10), "d": all_lies},
    }
    for folder, contents in files.items():
        for name, content in contents.items():
            write(root / folder / f"{name}.jsonl", content)
    wait_until_stamps_prove(root / "loud")
    return Lies(root / "quiet", root / "sampled", root / "loud")


@pytest.fixture
def right(lies: Lies, shape: Shape, tmp_path: Path) -> Callable[[Path], tuple[str, str]]:
    """The reference's bytes."""
    return lambda data: sha256(make(data, shape("llama3"), tmp_path / "right", tokenizer_backend="tokenizers"))


@pytest.mark.parametrize(("found", "num_proc"), [("loud", 2), ("sampled", 0)])
def test_a_backend_found_wrong_leaves_nothing_behind(
    liar: None,
    lies: Lies,
    right: Callable[[Path], Any],
    shape: Shape,
    tmp_path: Path,
    log: Any,
    found: str,
    num_proc: int,
) -> None:
    """In the middle of a run, or by the sample before it: what it made in an earlier run is made anew too."""
    cache, tokenizer, ours, reference = (
        tmp_path / "cache",
        shape("llama3"),
        f"fastokens {version('fastokens')}",
        f"tokenizers {version('tokenizers')}",
    )
    believed = make(lies.quiet, tokenizer, cache)
    before = {path.name: path.read_bytes() for path in believed.path.glob("data-*.arrow")}
    assert made_by(believed) == [ours]
    assert sha256(believed) != right(lies.quiet)  # the probe, the sample and the windows passed it
    log.clear()

    found_out = make(getattr(lies, found), tokenizer, cache, num_proc=num_proc)
    assert f"{ours} gave other ids than tokenizers (" in log.text
    made = int(log.text.split(" shards it made here are made anew")[0].rpartition(" ")[2])
    assert made >= len(believed.content["shards"]) >= 5  # those of the first run too
    assert sha256(found_out) == right(getattr(lies, found))
    assert made_by(found_out) == [reference]
    assert found_out.manifest["run"]["shards_reused"] == 0
    assert [wrong.name for wrong in distrusted(cache)] == [ours]
    log.clear()

    again = make(lies.quiet, tokenizer, cache)
    assert f"{ours} was wrong before (" in log.text
    assert f"{ours}, which made it, was wrong since" in log.text
    assert sha256(again) == right(lies.quiet)
    assert made_by(again) == [reference]
    [aside] = [path for path in (cache / "datasets").iterdir() if ".wrong-" in path.name]
    assert aside.name.split(".")[0] == believed.path.name
    assert f"set aside as {aside.name}" in log.text
    assert {
        path.name: path.read_bytes() for path in aside.glob("data-*.arrow")
    } == before  # whoever has it open keeps it
    log.clear()

    assert make(lies.quiet, tokenizer, cache).path == again.path
    assert "Found prepared" in log.text


def test_what_a_wrong_backend_published_is_not_used_though_its_shards_were_deleted(
    liar: None, lies: Lies, right: Callable[[Path], Any], shape: Shape, tmp_path: Path
) -> None:  # fmt: skip
    make(lies.quiet, shape("llama3"), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "shards")  # docs/cache.md allows it
    make(lies.sampled, shape("llama3"), tmp_path / "cache")
    assert sha256(make(lies.quiet, shape("llama3"), tmp_path / "cache")) == right(lies.quiet)


def test_a_directory_from_before_backends_is_still_found(lies: Lies, shape: Shape, tmp_path: Path, log: Any) -> None:
    """Its manifest does not say who encoded it, and there was only the reference."""
    first = make(lies.quiet, shape("llama3"), tmp_path)
    run = {name: value for name, value in first.manifest["run"].items() if name != "tokenizer_backends"}
    (first.path / "manifest.json").unlink()
    write_manifest(first.path, first.content, run)
    assert make(lies.quiet, shape("llama3"), tmp_path).path == first.path
    assert "Found prepared" in log.text


class Killed(KeyboardInterrupt):
    """Stands for SIGKILL: nobody catches it."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


KILLS = ("before it forgot", "before the redo", "in the redo", "before publishing")


@pytest.mark.parametrize(("when", "then"), [*((when, "auto") for when in KILLS), ("in the redo", "tokenizers")])
def test_a_run_killed_after_it_found_a_backend_wrong_is_made_good_by_the_next(
    liar: None, lies: Lies, right: Callable[[Path], Any], shape: Shape, tmp_path: Path, log: Any, when: str, then: str
) -> None:  # fmt: skip
    cache, tokenizer = tmp_path / "cache", shape("llama3")
    believed = make(lies.quiet, tokenizer, cache)
    with pytest.MonkeyPatch.context() as patch:
        if when == "before it forgot":
            patch.setattr(choosing, "forget", killed)
        elif when == "before publishing":
            patch.setattr(pretraining, "publish", killed)
        else:
            runs, commits, real, ledger_commit = itertools.count(), itertools.count(), pretraining._run, Ledger.commit

            def run(*given: Any, **more: Any) -> Any:
                if next(runs) == 1:
                    if when == "before the redo":
                        raise Killed
                    patch.setattr(
                        Ledger,
                        "commit",
                        lambda ledger, receipt: killed() if next(commits) == 3 else ledger_commit(ledger, receipt),
                    )
                return real(*given, **more)

            patch.setattr(pretraining, "_run", run)
        with pytest.raises(Killed):
            make(lies.loud, tokenizer, cache)
    assert (cache / "distrusted").exists()
    log.clear()
    for data in (lies.loud, lies.quiet):
        prepared = make(data, tokenizer, cache, tokenizer_backend=then)
        assert sha256(prepared) == right(data)
        assert f"fastokens {version('fastokens')}" not in made_by(prepared)
    assert prepared.path.name == believed.path.name


# ---- absent packages


@pytest.fixture(scope="session")
def environment_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """`environment_without(name)`: variables under which Python finds everything installed here but that package. It
    needs `python -S`.
    """

    def made(name: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("site")
        for entry in Path(pa.__file__).parents[1].iterdir():
            if not entry.name.replace("-", "_").startswith(name):
                (folder / entry.name).symlink_to(entry)
        return {**os.environ, "PYTHONPATH": str(folder)}

    return made


def prepare_without(environment: dict[str, str], cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-S",
        "-m",
        "moai",
        "prepare",
        "--dataset",
        "data/demo/ko.jsonl.zst",
        "--tokenizer_path",
        "tokenizers/demo",
        "--num_proc",
        "0",
        "--cache_dir",
        str(cache),
    ]
    return subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_a_backend_that_is_named_but_not_installed_is_one_line(
    environment_without: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    ended = prepare_without(environment_without("fastokens"), tmp_path / "cache", "--tokenizer_backend", "fastokens")
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    remedy = "the package fastokens is not installed (pip install fastokens); install it, or take auto"
    assert [line for line in ended.stderr.splitlines() if "error" in line] == [
        f"python -m moai prepare: error: --tokenizer_backend fastokens: {remedy}"
    ]


def test_without_fastokens_auto_works_through_the_reference_and_says_so(
    environment_without: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    ended = prepare_without(environment_without("fastokens"), tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    assert (
        f"tokenizer backend = tokenizers {version('tokenizers')}: fastokens is not installed (pip install fastokens)"
        in ended.stderr
    )
    assert made_by(Prepared.open(Path(ended.stdout.splitlines()[-1]))) == [f"tokenizers {version('tokenizers')}"]


# ---- workers


@dataclass(frozen=True)
class Spy:
    """Counts, in the worker and into the receipt, what is imported there when the documents are through, and what it
    had to load itself.
    """

    driver: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        loaded = _loaded.cache_info()
        yield from batches
        count("spy.shards")
        count("spy.in a worker", os.getpid() != self.driver)
        count("spy.loaded before", loaded.currsize)
        count("spy.loaded here", _loaded.cache_info().misses - loaded.misses)
        mapped = Path("/proc/self/maps").read_text()
        for package in ("torch", "transformers", "datasets", "pandas", "accelerate", "tokenizers", "fastokens"):
            count(f"spy.imported.{package}", package in sys.modules)
            count(f"spy.mapped.{package}", f"/{package}/" in mapped)


SPYING = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/tokenizers"]
import json, os
from dataclasses import replace
from pathlib import Path
from test_backends_run import Spy, make, receipts
from moai.pretraining import recipe as pretraining

if __name__ == "__main__":
    real = pretraining.pipeline
    def spied(*given, **more):
        made = real(*given, **more)
        return replace(made, transforms=(*made.transforms, Spy(os.getpid())))
    pretraining.pipeline = spied
    prepared = make(Path({data!r}), Path({tokenizer!r}), Path({cache!r}), num_proc=2)
    print(json.dumps([receipt.counts for receipt in receipts(prepared)]))
"""


def test_workers_find_the_tokenizer_loaded_and_import_nothing_heavy(shape: Shape, mixed: Path, tmp_path: Path) -> None:
    script = tmp_path / "spying.py"
    script.write_text(
        SPYING.format(root=str(ROOT), data=str(mixed), tokenizer=str(shape("llama3")), cache=str(tmp_path / "cache"))
    )
    ended = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    seen: Counter[str] = Counter()
    for counts in json.loads(ended.stdout.splitlines()[-1]):
        seen.update({name: number for name, number in counts.items() if name.startswith("spy.")})
    shards = seen["spy.shards"]
    assert shards >= 5
    assert seen["spy.in a worker"] == shards
    assert (
        seen["spy.loaded before"] == 2 * shards
    )  # the reference and fastokens, loaded where the worker was forked from
    assert seen["spy.loaded here"] == 0
    names = {name.rpartition(".")[2] for name in seen if name.startswith(("spy.imported.", "spy.mapped."))}
    assert names == {"tokenizers", "fastokens"}
