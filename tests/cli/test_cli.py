"""One command line: what it lists, how it answers to mistakes, what its help costs, and TAB in a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moai.cli import COMMANDS, main, usage

ROOT = Path(__file__).parents[2]
LIGHT = ("plan", "prepare", "train", "doctor", "generate")
"""Commands whose help a person asks for while thinking: it imports nothing that takes a while."""


@pytest.mark.parametrize("name", [*COMMANDS, "entity-coref"])
def test_every_command_says_what_it_is_for_and_lists_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", name])
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    assert f" {name}" in said.split("\n")[0] or f"moai {name}" in said
    if name in COMMANDS:
        assert f"  {name:10} {COMMANDS[name][1]}\n" in usage() + "\n"
    assert not [line for line in said.splitlines() if line.count("--seq_len") + line.count("--seq-len") > 1]


def test_mistakes_are_one_line_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepaer"]) == 2
    assert capsys.readouterr().err == (
        "moai: error: unknown command 'prepaer'; did you mean prepare? (moai --help lists them)\n"
    )
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: moai COMMAND")
    with pytest.raises(SystemExit, match="2"):
        main(["verify"])
    assert main(["plan", "--dataset", "data/demo"]) == 2
    assert "python -m moai plan: error: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in LIGHT)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys; from moai.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'numpy', 'pyarrow', 'torch', 'yaml', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_a_shell_completes_commands_flags_and_choices(tmp_path: Path) -> None:
    (tmp_path / "moai").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moai "$@"\n')
    (tmp_path / "moai").chmod(0o755)
    ask = (
        'COMP_LINE="moai {0}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; COMP_WORDS=($COMP_LINE); COMP_CWORD=1; '
        '_python_argcomplete moai; echo "${{COMPREPLY[@]}}"; '
    )
    lines = ("pre", "prepare --seq", "prepare --packing bfd", "verify --fu", "reembed --db lawfirm --chunking_s")
    script = 'eval "$(moai completion)"; ' + "".join(ask.format(line) for line in lines)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == [
        ["prepare"],
        ["--seq_len"],
        ["bfd", "bfd_split"],
        ["--full"],
        ["--chunking_strategy"],
    ]
