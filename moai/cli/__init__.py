"""The command line: one table of commands, each run by a function that is imported when it is asked for.

moai prepare --dataset data/demo --tokenizer_path tokenizers/demo
moai help prepare
eval "$(moai completion)"          # TAB completes commands, flags and choices in bash and zsh
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from moai.core.config import Resolved, completed, did_you_mean, resolve
from moai.core.errors import MoaiError
from moai.core.files import storage_errors
from moai.core.stopping import end, machine_errors, stop_at_once
from moai.core.terminal import printing
from moai.core.without_pandas import without_pandas

GROUPS = {
    "prepare and train": {
        "tokenizer": ("train:tokenizer", "train a byte-level BPE tokenizer on your data, or convert a slow-only one"),
        "prepare": ("prepare:prepare", "prepare data without training; the last line is the prepared directory"),
        "plan": ("prepare:plan", "what prepare would do with the same flags: hit or miss and why, disk, memory"),
        "quality": ("prepare:quality", "judge documents by a profile of rules, and show what each rule drops"),
        "train": ("train:train", "prepare the data, or wait for rank 0 to do it, then train; also under torchrun"),
        "evaluate": ("train:evaluate", "score a saved model on a prepared directory, source by source"),
        "generate": ("train:generate", "let a trained model continue a text, or answer with --chat"),
        "training": ("train:training", "what a training run logged; writes its training.html"),
    },
    "look, check and mend": {
        "status": ("look:status", "what launches are doing: state, progress, rate; --watch keeps looking"),
        "inspect": ("look:inspect", "prepared rows, token by token: what is learned, where documents end"),
        "view": ("look:view", "prepared directories in the browser: documents, rows, why a document went"),
        "explain": ("prepare:explain", "why these flags do not find a prepared directory, field by field"),
        "verify": ("look:verify", "check a prepared directory; --full reads every byte; exit 65 if a check fails"),
        "repair": ("look:repair", "make damaged and missing files of a prepared directory again, to the same bytes"),
        "gc": ("look:gc", "free space in a cache: what nothing needs any more, never anything in use"),
        "export": ("look:export", "write the documents of a prepared directory for another trainer"),
    },
    "this machine": {
        "doctor": ("train:doctor", "check tokenizer, cores, memory, disk, locks and environment"),
        "bench": (
            "prepare:bench",
            "measure prepare on a slice of the data: speed, the machine's limit, hours for all",
        ),
        "completion": ("look:completion", "what a shell evaluates to complete moai's commands and flags"),
    },
    "the other systems": {
        "coref": ("others:coref", "prepare the Korean entity-coref corpus; coref look DIR shows samples of one"),
        "reembed": ("others:reembed", "re-embed a law database: build, versions, compare, activate, search, ..."),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}
OTHER_NAMES = {"entity-coref": "coref"}


@dataclass(frozen=True)
class Call:
    """A command as it was typed, for the function that runs it."""

    name: str
    words: Sequence[str]
    summary: str

    @property
    def prog(self) -> str:
        return f"python -m moai {self.name}"

    def settings(self, *classes: type, others: Sequence[type] = ()) -> Resolved:
        """The classes' options from flags, environment and file, which may hold names of `others` too."""
        return resolve(classes, self.words, os.environ, prog=self.prog, description=self.summary, others=others)

    def parser(self) -> argparse.ArgumentParser:
        """For the few commands whose flags are no configuration: read what it parses with `parsed`."""
        return argparse.ArgumentParser(prog=self.prog, description=self.summary)

    def parsed(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        completed(parser)
        return parser.parse_args(list(self.words))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A person's mistake is one line on standard error and an exit code, never a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_ARGCOMPLETE" in os.environ:
        words = _words_to_complete()
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("--version", "version"):
        print(f"moai {import_module('moai').__version__}")
        return 0
    name = OTHER_NAMES.get(words[0], words[0])
    if name not in COMMANDS:
        near = did_you_mean(words[0], [*COMMANDS, *OTHER_NAMES])
        print(f"moai: error: unknown command {words[0]!r}{near} (moai --help lists them)", file=sys.stderr)
        return 2
    place, summary = COMMANDS[name]
    call = Call(words[0], words[1:], f"{summary[0].upper()}{summary[1:]}.")
    with printing():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        return _run(call, *place.split(":"))


def _run(call: Call, module: str, function: str) -> int:
    try:
        with storage_errors(Path()), machine_errors():
            return int(getattr(import_module(f"moai.cli.{module}"), function)(call))
    except MoaiError as error:
        print(f"{call.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{call.prog}: stopped; finished shards are kept, run again to go on from them", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def run() -> NoReturn:
    """`moai` and `python -m moai`: a process that is moai's alone."""
    stop_at_once()
    without_pandas()
    end(main())


def usage() -> str:
    """All commands, by what they are for."""
    lines = ["usage: moai COMMAND [flags]        moai help COMMAND tells more; python -m moai is the same"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:10} {summary}" for name, (_, summary) in commands.items())]
    return "\n".join(lines)


def _words_to_complete() -> list[str]:
    """The words before the one at the cursor. Where that one is the command itself, its completions, and the end."""
    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = typed.split()[1:]
    if not words or (len(words) == 1 and not typed[-1].isspace()):
        parser = argparse.ArgumentParser(prog="moai")
        parser.add_argument("command", choices=[*COMMANDS, "help"])
        completed(parser)
    os.environ["_ARGCOMPLETE"] = "2"  # the flags are those of the word after `moai`
    return words
