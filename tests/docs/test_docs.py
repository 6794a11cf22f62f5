"""The documentation says what the code does: commands, flags, defaults, messages, figures, and the same in both
languages.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moai.bench import BenchConfig
from moai.cache.gc.collect import GcConfig
from moai.cli import COMMANDS, OTHER_NAMES
from moai.cli import main as moai_main
from moai.core import errors
from moai.core.config import parse_size, resolve
from moai.coref.mlm_evaluate import EvaluateConfig
from moai.coref.mlm_finetune import FinetuneConfig
from moai.coref.options import CorefConfig
from moai.doctor import DoctorConfig
from moai.pretraining.explain import ExplainConfig
from moai.pretraining.options import DataConfig, SaveConfig
from moai.pretraining.quality import QualityConfig
from moai.pretraining.status import StatusConfig
from moai.reembedding.asking import AskConfig
from moai.reembedding.command import VersionConfig
from moai.reembedding.monitor import SpeedConfig, WatchConfig
from moai.reembedding.options import ReembedConfig
from moai.tokenizers.train import TokenizerConfig
from moai.training.arguments import TrainConfig
from moai.training.generate import GenerateConfig
from moai.training.launch import NAMES
from moai.training.score import ScoreConfig
from moai.view.command import add_arguments as add_view_arguments

ROOT = Path(__file__).parents[2]
PAGES = (
    "DATASET_OPTIMIZATION.md",
    "QUICKSTART.md",
    "USER_GUIDE.md",
    "architecture.md",
    "cache.md",
    "cluster.md",
    "conformance.md",
    "entity-coref.md",
    "guides.md",
    "instruction-tuning.md",
    "library.md",
    "other-trainers.md",
    "pretraining.md",
    "quality.md",
    "re_embedding_troubleshooting.md",
    "reembedding.md",
    "reliability.md",
    "serving.md",
    "training.md",
    "view.md",
    "watching-training.md",
)
PAIRS = [
    (ROOT / "README.md", ROOT / "README.ko.md"),
    *((ROOT / "docs" / name, ROOT / "docs" / "ko" / name) for name in PAGES),
]
ENGLISH = [english for english, _ in PAIRS]
DOCUMENTS = [document for pair in PAIRS for document in pair]
PRETRAINING = [ROOT / "docs" / "pretraining.md", ROOT / "docs" / "ko" / "pretraining.md"]
TROUBLES = [
    *PRETRAINING,
    ROOT / "docs" / "re_embedding_troubleshooting.md",
    ROOT / "docs" / "ko" / "re_embedding_troubleshooting.md",
]
CACHE = [ROOT / "docs" / "cache.md", ROOT / "docs" / "ko" / "cache.md"]


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def fences(document: Path) -> Iterator[tuple[str, str]]:
    """(words behind the fence, text) of each code block."""
    for info, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL):
        yield info.strip(), text


def prose(document: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    blocks = [text for info, text in fences(document) if info.split()[:1] == ["bash"]]
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def tables(document: Path) -> list[list[str]]:
    """The cells of every table row but the rulers."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in prose(document).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not re.fullmatch(r"[-:| ]+", "|".join(row))]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


# --- commands ---------------------------------------------------------------------------------------------------------


def check(command: str) -> None:
    """Parse one command with the parser of the program it calls. Raises or exits where that parser would refuse it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    match words:
        case ["python", "-m", "moai", "verify", directory] | ["python", "-m", "moai", "verify", directory, "--full"]:
            assert not directory.startswith("-")
        case ["python", "-m", "moai", "view", *flags]:
            view_parser().parse_args(flags)
        case ["python", "-m", "moai", "inspect", directory, *_]:
            assert not directory.startswith("-")
        case ["python", "-m", "moai", "export", directory, "--to", "megatron", out]:
            assert not directory.startswith("-")
            assert not out.startswith("-")
        case ["python", "-m", "moai", ("prepare" | "plan") as which, *flags]:
            assert which in {*COMMANDS, *OTHER_NAMES}
            resolve([DataConfig, SaveConfig], flags, {}, prog="moai")[DataConfig].require()
        case ["rsync", "-a", *_]:
            pass
        case ["python", "-m", "moai", "training", directory]:
            assert not directory.startswith("-")
        case ["python", "-m", "moai", "evaluate", *flags]:
            resolve([ScoreConfig], flags, {}, prog="moai")[ScoreConfig].require()
        case ["python", "-m", "moai", "generate", *flags]:
            resolve([GenerateConfig], flags, {}, prog="moai")[GenerateConfig].require()
        case ["python", "-m", "moai", "bench", *flags]:
            resolve([DataConfig, BenchConfig], flags, {}, prog="moai")[DataConfig].require()
        case ["python", "-m", "moai", "quality", *flags]:
            resolve([DataConfig, QualityConfig], flags, {}, prog="moai")[DataConfig].require()
        case ["python", "-m", "moai", "reembed", ("search" | "evaluate"), *flags]:
            resolve([AskConfig], flags, {}, prog="reembed")
        case ["python", "-m", "moai", "reembed", "rollback", *flags]:
            resolve([VersionConfig], flags, {}, prog="reembed")
        case ["python", "-m", "moai", "reembed", *flags] | [
            "python",
            "scripts/migrations/re_embed_existing_data_optimized.py",
            *flags,
        ]:
            resolve([ReembedConfig], flags, {}, prog="reembed")
        case [
            "python",
            ("scripts/monitor_re_embedding_progress.py" | "scripts/check_re_embedding_performance.py"),
            *flags,
        ]:
            resolve([WatchConfig], flags, {}, prog="monitor")
        case ["python", "scripts/monitor_re_embedding_speed.py", *flags]:
            resolve([WatchConfig, SpeedConfig], flags, {}, prog="monitor")
        case ["python", ("scripts/check_system_specs.py" | "scripts/check_pytorch_threads.py") as script]:
            assert (ROOT / script).is_file()
        case ["python", "-m", "moai", "entity-coref", *flags] | [
            "python",
            "scripts/prepare_entity_coref_v2.py",
            *flags,
        ]:
            resolve([CorefConfig], flags, {}, prog="entity-coref")
        case ["python", "scripts/run_entity_coref_finetune.py", *flags]:
            resolve([FinetuneConfig], flags, {}, prog="finetune")
        case ["python", "scripts/evaluate_entity_coref.py", *flags]:
            resolve([EvaluateConfig], flags, {}, prog="evaluate")
        case ["python", "scripts/train_tokenizer.py", *flags]:
            resolve([TokenizerConfig], flags, {}, prog="train_tokenizer")
        case ["python", "verify_optimization.py", *flags]:
            resolve([DoctorConfig], flags, {}, prog="doctor")
        case ["python", "train.py", *flags]:
            check_training(flags)
        case ["torchrun", *rest]:
            check_launcher(torchrun_parser(), rest)
        case ["accelerate", "launch", *rest]:
            check_launcher(accelerate_parser(), rest)
        case [("./pretrain.sh" | "./pretrain_cont.sh") as script, *rest]:
            check_wrapper(script, rest)
        case ["./tests/run.sh"] | ["source", "optimize_env.sh"] | ["python", "tests/reliability.py"]:
            assert (ROOT / words[-1]).is_file()
        case ["./tests/run.sh", "--long"]:
            assert "--long)" in read(ROOT / words[0])
        case _:
            pytest.fail(f"no parser for: {command}")


def check_training(flags: list[str]) -> None:
    resolved = resolve([TrainConfig, DataConfig], flags, {}, prog="train.py")
    if not resolved[TrainConfig].require().prepared:
        resolved[DataConfig].require()


def check_launcher(parser: argparse.ArgumentParser, words: list[str]) -> None:
    arguments = parser.parse_args(words)
    assert arguments.training_script == "train.py"
    check_training(arguments.training_script_args)


def check_wrapper(script: str, words: list[str]) -> None:
    given = words[0] if words and not words[0].startswith("-") else NAMES[0]
    flags = [
        word
        for word in words[1 if words[:1] == [given] else 0 :]
        if not (script == "./pretrain_cont.sh" and word == "--resume")
    ]
    assert given in NAMES
    check_training(["--config", str(ROOT / "configs" / f"{given}.yaml"), *flags])


def view_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_view_arguments(parser)
    return parser


def torchrun_parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def accelerate_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@pytest.mark.parametrize("document", ENGLISH, ids=name)
def test_every_command_parses_and_its_files_exist(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(document):
        check(command)
        for path in re.findall(r"(?:configs|data|scripts)/[\w./-]+", command):
            assert (ROOT / path).exists(), f"{command}: {path}"


def test_the_command_check_sees_a_wrong_flag_and_a_wrong_value() -> None:
    with pytest.raises(SystemExit):
        check("python -m moai prepare --dataset data/demo --tokenizer_path tokenizers/demo --sequence 4")
    with pytest.raises(errors.ConfigError):
        check("python train.py --config configs/demo.yaml --packing best")
    with pytest.raises(SystemExit):
        check("torchrun --procs 2 train.py --config configs/demo.yaml")


def test_some_command_is_checked_in_each_kind() -> None:
    found = " ".join(command for document in ENGLISH for command in commands(document))
    for word in (
        "moai prepare",
        "moai plan",
        "moai verify",
        "torchrun",
        "accelerate launch",
        "./pretrain.sh",
        "./pretrain_cont.sh",
        "./tests/run.sh",
    ):
        assert word in found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_flag_in_the_text_is_a_flag_of_some_program(document: Path) -> None:
    known = known_flags()
    mentioned = {
        flag
        for span in re.findall(r"`([^`]+)`", prose(document))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
    }
    assert mentioned - known == set()


def known_flags() -> set[str]:
    fields = [
        f
        for cls in (
            DataConfig,
            SaveConfig,
            TrainConfig,
            BenchConfig,
            QualityConfig,
            DoctorConfig,
            TokenizerConfig,
            GcConfig,
            StatusConfig,
            ExplainConfig,
            ReembedConfig,
            VersionConfig,
            AskConfig,
            WatchConfig,
            SpeedConfig,
            CorefConfig,
            FinetuneConfig,
            EvaluateConfig,
            GenerateConfig,
            ScoreConfig,
        )
        for f in dataclasses.fields(cls)
    ]
    own = {
        f"--{spelling}"
        for f in fields
        for word in (f.name, *f.metadata["names"])
        for spelling in (word, word.replace("_", "-"))
    }
    parsers = {
        option
        for parser in (accelerate_parser(), torchrun_parser(), view_parser())
        for action in parser._actions
        for option in action.option_strings
    }
    return (
        own
        | parsers
        | {
            "--config",
            "--help",
            "--resume",
            "--long",
            "--quick",
            "--full",
            "--no-pronoun-filter",
            "--to",
            "--html",
            "--samples",
        }
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_test_that_is_named_is_there(document: Path) -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", prose(document))
    assert len(named) > 70 or document.name != "reliability.md"
    for file, test in named:
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {test}" in read(found), f"{file}::{test}"


# --- flags, defaults, codes, messages, variables ----------------------------------------------------------------------


def flag_rows(document: Path) -> list[tuple[list[str], str]]:
    """(flags, default) of each row of the flag tables."""
    rows = [row for row in tables(document) if len(row) == 3 and row[0].startswith("`--")]
    return [(re.findall(r"--([\w-]+)", row[0]), row[1]) for row in rows]


def configuration() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for cls in (DataConfig, TrainConfig) for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_every_flag_is_in_the_tables(document: Path) -> None:
    shown = {flag for flags, _ in flag_rows(document) for flag in flags}
    assert set(configuration()) - shown == set()


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_defaults_in_the_tables_are_the_defaults(document: Path) -> None:
    fields, compared = configuration(), 0
    for flags, shown in flag_rows(document):
        named = [flag for flag in flags if flag in fields]
        values = shown.split(", ") if len(named) > 1 else [shown] * len(named)
        values = values * len(named) if len(values) == 1 else values
        for flag, text in zip(named, values, strict=True):
            value = as_value(text, fields[flag].default)
            if value is not ...:
                assert value == fields[flag].default, f"--{flag}: {text}"
                compared += 1
    assert compared > 30


def as_value(text: str, like: Any) -> Any:
    """A cell of the table as the type of the default; `...` where it is words."""
    text = text.strip("`")
    if like is None or like in ("", ()):
        return ...
    if text in ("", "none"):  # nothing shown for a default that says "not set" in its own way
        return ... if like == -1 or text == "" else text
    if isinstance(like, bool):
        return {"true": True, "false": False}[text]
    if isinstance(like, int | float):
        try:
            return type(like)(float(text))
        except ValueError:
            return parse_size(text) if re.match(r"[0-9.]+ [KMG]i?B$", text) else ...
    return text


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_flags_that_change_the_output_carry_the_star(document: Path) -> None:
    starred = {
        flag for row in tables(document) if row[0].startswith("`--") for flag in re.findall(r"`--([\w-]+)` \*", row[0])
    }
    affecting = {field for field, f in configuration().items() if f.metadata["affects_output"]}
    assert starred == affecting | {
        "tokenizer_path",
        "transforms",
        "quality",
        "quality_set",
        "dedup",
        "dedup_similarity",
        "languages",
        "decontaminate",
        "pii",
        "dedup_against",
    }  # these are in the key by what they hold


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_every_exit_code_is_in_the_table(document: Path) -> None:
    shown = {int(code) for row in tables(document) if re.fullmatch(r"[\d, ]+", row[0]) for code in row[0].split(",")}
    family = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.MoaiError)]
    assert {cls.exit_code for cls in family} | {0, 129, 130, 143} == shown


@pytest.mark.parametrize("document", TROUBLES, ids=name)
def test_the_messages_of_the_troubleshooting_table_are_the_codes_own(document: Path) -> None:
    """`...` stands for what changes; each piece between must stand in one string of the code."""
    constants = string_pieces()
    rows = tables(document)
    header = next(index for index, row in enumerate(rows) if row[0] in ("message", "메시지"))
    messages = [message for row in rows[header + 1 :] for message in re.findall(r"`([^`]+)`", row[0])]
    assert len(messages) > (30 if document in PRETRAINING else 8)
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        for piece in pieces:
            assert any(piece in constant for constant in constants), f"{message!r}: {piece!r} is nowhere in the code"


@functools.cache
def string_pieces() -> list[str]:
    paths = [*(ROOT / "moai").rglob("*.py"), ROOT / "train.py"]
    nodes = (node for path in paths for node in ast.walk(ast.parse(read(path))))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_variables_in_the_tables_are_read_somewhere(document: Path) -> None:
    sources = [*(ROOT / "moai").rglob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*")]
    code = "\n".join(read(path) for path in sources if path.is_file())
    variables = {v for row in tables(document) for v in re.findall(r"`([A-Z][A-Z_]{4,})`", row[0])} - {
        "HF_HOME",
        "HF_TOKEN",
    }
    assert len(variables) > 15
    assert [variable for variable in sorted(variables) if not re.search(rf"\b{variable}\b", code)] == []


# --- links, places, languages -----------------------------------------------------------------------------------------


def headings(document: Path) -> list[str]:
    return re.findall(r"^(#+ .*)$", prose(document), re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    texts = [heading.lstrip("# ").lower() for heading in headings(document)]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_resolve(document: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", prose(document)) if not target.startswith("https://")]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_path_of_a_machine(document: Path) -> None:
    assert re.findall(r"(?<![\w.~…])/(?:work|tmp|root|home)\b\S*", read(document)) == []


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: name(pair[0]))
def test_both_languages_say_the_same(pair: tuple[Path, Path]) -> None:
    english, korean = pair
    assert [heading.split()[0] for heading in headings(english)] == [heading.split()[0] for heading in headings(korean)]
    assert commands(english) == commands(korean)
    assert [info for info, _ in fences(english)] == [info for info, _ in fences(korean)]
    assert [len(row) for row in tables(english)] == [len(row) for row in tables(korean)]
    assert sorted(re.findall(r"\d[\d,.]*\d", prose(english))) == sorted(re.findall(r"\d[\d,.]*\d", prose(korean)))


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    directory: Path
    printed: str

    @property
    def manifest(self) -> str:
        return read(self.directory / "manifest.json")


def prepare(cache: Path, *flags: str) -> Run:
    out = io.StringIO()
    words = [
        "--dataset",
        str(ROOT / "data/demo"),
        "--tokenizer_path",
        str(ROOT / "tokenizers/demo"),
        "--seq_len",
        "256",
    ]
    with contextlib.redirect_stdout(out):
        assert moai_main(["prepare", *words, "--num_proc", "0", "--cache_dir", str(cache), *flags]) == 0
    return Run(Path(out.getvalue().splitlines()[-1]), out.getvalue())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("cache"), "--packing", "bfd_split", "--shard_bytes", "1MB")


@pytest.mark.parametrize("document", CACHE, ids=name)
def test_the_manifest_shown_is_the_manifest_made(document: Path, demo: Run) -> None:
    shown = next(text for info, text in fences(document) if info == "json" and '"content": {' in text)
    content = shown[: shown.index('"content_digest"')]
    real = {line.rstrip(",") for line in demo.manifest.splitlines()}
    lines = [line.rstrip(",") for line in content.splitlines() if line.strip() and "…" not in line]
    assert len(lines) > 70
    assert [line for line in lines if line not in real] == []
    for field, start in re.findall(r'"(\w+)": "(\w+)…"', shown):
        assert re.search(rf'"{field}": "{start}', demo.manifest), field


@pytest.mark.parametrize("document", CACHE, ids=name)
def test_every_field_of_the_manifest_is_explained(document: Path, demo: Run) -> None:
    explained = {word for row in tables(document) for word in re.findall(r"`(\w+)`", row[0])}
    assert set(json.loads(demo.manifest)["content"]) - explained == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_command_names_a_directory_by_its_key(document: Path) -> None:
    assert not [command for command in commands(document) if re.search(r"[0-9a-f]{32}", command)]


def test_what_the_container_copies_and_runs_is_there() -> None:
    said = (ROOT / "Dockerfile").read_text()
    [context] = re.findall(r"^COPY (\S+) \.$", said, re.MULTILINE)
    assert context == "."
    [script] = re.findall(r"^RUN .*?(\S+\.sh)", said, re.MULTILINE)
    assert os.access(ROOT / script, os.X_OK)
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()
    for command in re.findall(r"^#   docker run .* moai ((?!--).+)$", said, re.MULTILINE):
        check(f"python -m moai {command}" if "train.py" not in command else f"torchrun {command}")


@pytest.mark.parametrize("document", CACHE, ids=name)
def test_the_layout_names_every_directory_of_a_cache(document: Path, demo: Run) -> None:
    layout = next(text for info, text in fences(document) if "<cache>/" in text)
    made = {path.name for path in demo.directory.parent.parent.iterdir()}
    assert made <= set(re.findall(r"^  (\w+)/", layout, re.MULTILINE))


@pytest.mark.parametrize("document", PRETRAINING, ids=name)
def test_the_filter_shown_keeps_what_is_shown(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(text for info, text in fences(document) if "class MostlyLetters" in text)
    entry = next(text for info, text in fences(document) if text.startswith("transforms:"))
    shown = next(text for info, text in fences(document) if text.startswith("documents "))
    (tmp_path / "my_filters.py").write_text(f"from dataclasses import dataclass\n\nfrom moai import Filter\n\n\n{code}")
    (tmp_path / "data.yaml").write_text(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    sys.modules.pop("my_filters", None)
    printed = prepare(tmp_path / "cache", "--config", "data.yaml", "--packing", "bfd_split").printed
    sys.modules.pop("my_filters")
    assert shown.strip() in printed


def test_the_packing_table_is_what_the_demo_gives(tmp_path: Path) -> None:
    asked = {
        "`wrapped`": "wrapped",
        "`bfd_split`": "bfd_split",
        "`bfd`": "bfd",
        "`none` (": "none",
        "`none` with": "none --long_documents split",
    }
    for start, packing in asked.items():
        printed = prepare(tmp_path, *f"--packing {packing}".split()).printed
        found = re.search(r"\+ ([\d,]+) dropped\nrows +([\d,]+) of 256, fill rate ([\d.]+)", printed)
        assert found, printed
        dropped, rows, fill = found.groups()
        row = next(row for row in tables(PRETRAINING[0]) if row[0].startswith(start) and len(row) == 5)
        assert row[1:4] == [rows, f"{float(fill):.2%}".replace("%", " %"), dropped]
