"""The command table: `python -m moai COMMAND --help`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from moai.core.errors import MoaiError
from moai.core.stopping import end
from moai.core.without_pandas import numpy_without_threads, with_pandas, without_pandas


def prepare(argv: Sequence[str]) -> int:
    """Prepare data without training; the last line of standard output is the prepared directory."""
    from moai.core.config import resolve
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [DataConfig, SaveConfig],
        argv,
        os.environ,
        prog="python -m moai prepare",
        description=prepare.__doc__ or "",
        others=[TrainConfig],
    )
    numpy_without_threads()
    from moai.pretraining.saving import prepare_and_save  # not for --help, which is there at once

    prepared = prepare_and_save(resolved[DataConfig], resolved[SaveConfig], origins=resolved.origins)
    content = prepared.content
    records, tokens = content["records"], content["token_counts"]
    print(
        f"documents    {records['read']:,} read = {records['kept']:,} kept + {records['filtered']:,} filtered + "
        f"{records['quarantined']:,} quarantined"
    )
    print(
        f"tokens       {tokens['text']:,} of text + {tokens['eos'] + tokens.get('bos', 0):,} ends = {tokens['rows']:,} "
        f"in rows + {tokens.get('dropped', 0):,} dropped"
    )
    if chat := content.get("chat"):
        counts = chat["counts"]
        print(
            f"learned      {tokens.get('trained', 0):,} tokens of {counts['examples']:,} examples, "
            f"{counts['turns'] - counts.get('turns_unverified', 0):,} of {counts['turns']:,} turns;"
            f" left out: {counts.get('too_long', 0):,} too long, {counts.get('untrained', 0):,} with nothing to learn"
        )
    print(
        f"rows         {content['rows']:,} of {content['seq_len']}, fill rate {content['fill_rate']:.4f}, "
        f"{prepared.columns[0].type}, {content['packing']}"
    )
    if held_out := prepared.held_out:
        print(
            f"held out     {held_out.content['documents']:,} documents, {held_out.content['rows']:,} rows, in "
            f"{held_out.path}"
        )
    print(f"content      {prepared.content_digest}")
    print(prepared.path)
    return 0


def plan(argv: Sequence[str]) -> int:
    """Show what prepare would do with the same flags: key, hit or miss and why, shards, disk, memory."""
    from moai.core.config import resolve
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [DataConfig],
        argv,
        os.environ,
        prog="python -m moai plan",
        description=plan.__doc__ or "",
        others=[TrainConfig, SaveConfig],
    )
    from moai.pretraining.plan import describe

    for line in describe(resolved[DataConfig], resolved.origins):
        print(line)
    return 0


def bench(argv: Sequence[str]) -> int:
    """Measure prepare on a slice of the data: MB/s, tokens/s, where the time goes, this machine's limit, hours for all
    of it.
    """
    from moai.bench import BenchConfig, measure
    from moai.core.config import resolve
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [DataConfig, BenchConfig],
        argv,
        os.environ,
        prog="python -m moai bench",
        description=bench.__doc__ or "",
        others=[TrainConfig, SaveConfig],
    )
    for line in measure(resolved[DataConfig], resolved[BenchConfig], resolved.origins).lines():
        print(line)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check a prepared directory: manifest, sizes, rows, a decoded sample; with --full every byte and token. Exit 65 if
    a check fails.
    """
    from moai.prepared.verify import verify as checks

    parser = argparse.ArgumentParser(prog="python -m moai verify", description=verify.__doc__)
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    parser.add_argument(
        "--full", action="store_true", help="hash every file, compare every token id and every row's pieces"
    )
    given = parser.parse_args(list(argv))
    results = []
    for check in checks(given.directory, full=given.full):
        results.append(check)
        print(check, flush=True)
    failed = sum(not check.ok for check in results)
    print(
        f"{failed} of {len(results)} checks FAILED"
        if failed
        else f"all {len(results)} checks passed" + ("" if given.full else "; --full hashes every byte")
    )
    return 65 if failed else 0


def repair(argv: Sequence[str]) -> int:
    """Make the damaged and missing files of a prepared directory again, to the same bytes."""
    from moai.core.stopping import stoppable
    from moai.pretraining.repair import repair as lines

    parser = argparse.ArgumentParser(prog="python -m moai repair", description=repair.__doc__)
    parser.add_argument("directory", type=Path, help="the prepared directory")
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="X",
        help="where the input is now, in the order it was given to prepare",
    )
    parser.add_argument(
        "--tokenizer_path", default="", metavar="DIR", help="a copy of the tokenizer, if the directory's own is damaged"
    )
    given = parser.parse_args(list(argv))
    with stoppable("what was repaired stays, run again for the rest"):
        _print(lines(given.directory, dataset=given.dataset, tokenizer_path=given.tokenizer_path))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Show prepared rows token by token: what is learned, where documents end; --html FILE writes a page."""
    from moai.prepared.inspect import inspect as lines

    parser = argparse.ArgumentParser(prog="python -m moai inspect", description=inspect.__doc__)
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    parser.add_argument("--rows", type=int, default=10, metavar="N", help="the first rows that are shown (10)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of text")
    given = parser.parse_args(list(argv))
    _print(lines(given.directory, rows=given.rows, html=given.html))
    return 0


def export(argv: Sequence[str]) -> int:
    """Write the documents of a prepared directory for another trainer: --to megatron; the last line is what it takes as
    --data-path.
    """
    from moai.core.stopping import stoppable
    from moai.prepared.export import FORMATS

    parser = argparse.ArgumentParser(prog="python -m moai export", description=export.__doc__)
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="the trainer")
    parser.add_argument(
        "out", type=Path, help="where to write; for megatron OUT.bin and OUT.idx, neither of which may be there"
    )
    given = parser.parse_args(list(argv))
    with stoppable("nothing was exported, run again"):
        _print(FORMATS[given.to](given.directory, given.out))
    return 0


def gc(argv: Sequence[str]) -> int:
    """Give space in a cache back: what killed runs left, what nothing leads to; by age and size; never anything in
    use.
    """
    from moai.cache.gc.collect import GcConfig, collect
    from moai.core.config import resolve
    from moai.core.stopping import stoppable
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [GcConfig],
        argv,
        os.environ,
        prog="python -m moai gc",
        description=gc.__doc__ or "",
        others=[DataConfig, SaveConfig, TrainConfig],
    )
    with stoppable("nothing is half removed"):
        _print(collect(resolved[GcConfig]))
    return 0


def status(argv: Sequence[str]) -> int:
    """What launches are doing: state, progress, rate, heartbeat; --watch looks again and again."""
    from moai.core.config import resolve
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.pretraining.status import StatusConfig, show
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [StatusConfig],
        argv,
        os.environ,
        prog="python -m moai status",
        description=status.__doc__ or "",
        others=[DataConfig, SaveConfig, TrainConfig],
    )
    _print(show(resolved[StatusConfig]))
    return 0


def explain(argv: Sequence[str]) -> int:
    """Why this key differs from a prepared directory's, field by field; prepare's flags, and --against DIR."""
    from moai.core.config import resolve
    from moai.pretraining.explain import ExplainConfig
    from moai.pretraining.explain import explain as lines
    from moai.pretraining.options import DataConfig, SaveConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve(
        [DataConfig, ExplainConfig],
        argv,
        os.environ,
        prog="python -m moai explain",
        description=explain.__doc__ or "",
        others=[TrainConfig, SaveConfig],
    )
    _print(lines(resolved[DataConfig], resolved[ExplainConfig].against))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Score a saved model on a prepared directory: loss, perplexity and bits per byte of each source; the last line is
    JSON.
    """
    with_pandas()  # torch looks for it
    from moai.core.config import resolve
    from moai.training.score import ScoreConfig, score

    _print(
        score(
            resolve(
                [ScoreConfig], argv, os.environ, prog="python -m moai evaluate", description=evaluate.__doc__ or ""
            )[ScoreConfig]
        )
    )
    return 0


def training(argv: Sequence[str]) -> int:
    """What a training run logged: the last lines, and training.html written anew; the last line is its path."""
    from moai.training.page import show

    parser = argparse.ArgumentParser(prog="python -m moai training", description=training.__doc__)
    parser.add_argument("directory", type=Path, help="the run's --output_dir")
    _print(show(parser.parse_args(list(argv)).directory))
    return 0


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def generate(argv: Sequence[str]) -> int:
    """Let a trained model go on with a text: --model DIR --prompt TEXT; --chat uses its chat template."""
    with_pandas()  # torch looks for it
    from moai.core.config import resolve
    from moai.training.generate import GenerateConfig
    from moai.training.generate import generate as write

    resolved = resolve(
        [GenerateConfig], argv, os.environ, prog="python -m moai generate", description=generate.__doc__ or ""
    )
    write(resolved[GenerateConfig].require(), write=lambda text: print(text, end="", flush=True))
    return 0


def entity_coref(argv: Sequence[str]) -> int:
    """Prepare the Korean entity-coref corpus; the last line of standard output is its directory."""
    from moai.core.config import resolve
    from moai.coref import prepare as prepare_corpus
    from moai.coref.options import CorefConfig

    resolved = resolve(
        [CorefConfig], argv, os.environ, prog="python -m moai entity-coref", description=entity_coref.__doc__ or ""
    )
    print(prepare_corpus(resolved[CorefConfig], origins=resolved.origins))
    return 0


def reembed(argv: Sequence[str]) -> int:
    """Re-embed a law database: build, versions, compare, activate, rollback, search, delete, gc, restore-index; `build`
    if the first word is a flag.
    """
    from moai.reembedding.command import main as command

    return command(argv, os.environ)


def train(argv: Sequence[str]) -> int:
    """Prepare the data, or wait for rank 0 to do it, then train; also torchrun -m moai train, accelerate launch -m moai
    train.
    """
    with_pandas()  # torch looks for it
    from moai.training.command import main as command

    return command(argv, os.environ, prog="python -m moai train")


def tokenizer(argv: Sequence[str]) -> int:
    """Train a fast byte-level BPE tokenizer on your data, or convert a slow-only one."""
    from moai.tokenizers.train import main as command

    return command(argv)


def doctor(argv: Sequence[str]) -> int:
    """Check tokenizer, cores, memory, disk, locks and environment on this machine."""
    from moai.doctor import main as command

    return command(argv, os.environ)


def version(argv: Sequence[str]) -> int:
    """The version of moai."""
    from moai import __version__

    print(f"moai {__version__}")
    return 0


Command = Callable[[Sequence[str]], int]
GROUPS: dict[str, dict[str, Command]] = {
    "prepare and train": {
        "tokenizer": tokenizer,
        "prepare": prepare,
        "plan": plan,
        "train": train,
        "evaluate": evaluate,
        "generate": generate,
        "training": training,
    },
    "look, check and mend": {
        "status": status,
        "inspect": inspect,
        "explain": explain,
        "verify": verify,
        "repair": repair,
        "gc": gc,
        "export": export,
    },
    "this machine": {"doctor": doctor, "bench": bench},
    "the other systems": {"coref": entity_coref, "reembed": reembed},
}
COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}
OTHER_NAMES = {"entity-coref": "coref", "--version": "version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A person's mistake is one line on standard error and an exit code, never a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name = OTHER_NAMES.get(words[0], words[0])
    command = version if name == "version" else COMMANDS.get(name)
    if command is None:
        from moai.core.config import did_you_mean

        near = did_you_mean(words[0], [*COMMANDS, *OTHER_NAMES])
        print(f"moai: error: unknown command {words[0]!r}{near} (moai --help lists them)", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return command(words[1:])
    except MoaiError as error:
        with contextlib.suppress(OSError):  # a terminal that was closed
            print(f"python -m moai {words[0]}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            f"python -m moai {words[0]}: stopped; finished shards are kept, run again to go on from them",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 141


def usage() -> str:
    """All commands, by what they are for."""
    lines = ["usage: moai COMMAND [flags]        moai help COMMAND tells more; python -m moai is the same"]
    for group, commands in GROUPS.items():
        lines += [
            "",
            f"{group}:",
            *(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    without_pandas()
    end(main())
