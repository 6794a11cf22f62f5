"""The command table: `python -m moai COMMAND --help`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moai.errors import MoaiError, StorageError


def prepare(argv: Sequence[str]) -> int:
    """Prepare data without training; the last line of standard output is the prepared directory."""
    from moai.config import resolve
    from moai.recipes.options import DataConfig
    from moai.recipes.pretraining import prepare_or_wait
    from moai.training.arguments import TrainConfig

    resolved = resolve([DataConfig], argv, os.environ, prog="python -m moai prepare", description=prepare.__doc__ or "", others=[TrainConfig])
    prepared = prepare_or_wait(resolved[DataConfig], origins=resolved.origins)
    content = prepared.content
    records, tokens = content["records"], content["token_counts"]
    print(f"documents    {records['read']:,} read = {records['kept']:,} kept + {records['filtered']:,} filtered + {records['quarantined']:,} quarantined")
    print(
        f"tokens       {tokens['text']:,} of text + {tokens['eos'] + tokens.get('bos', 0):,} ends = {tokens['rows']:,} in rows + {tokens.get('dropped', 0):,} dropped"
    )
    print(f"rows         {content['rows']:,} of {content['seq_len']}, fill rate {content['fill_rate']:.4f}, {content['dtype']}, {content['packing']}")
    print(f"content      {prepared.content_digest}")
    print(prepared.path)
    return 0


def plan(argv: Sequence[str]) -> int:
    """Show what prepare would do with the same flags: key, hit or miss and why, shards, disk, memory."""
    from moai.config import resolve
    from moai.planning import describe
    from moai.recipes.options import DataConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve([DataConfig], argv, os.environ, prog="python -m moai plan", description=plan.__doc__ or "", others=[TrainConfig])
    for line in describe(resolved[DataConfig], resolved.origins):
        print(line)
    return 0


def bench(argv: Sequence[str]) -> int:
    """Measure prepare on a slice of the data: MB/s, tokens/s, where the time goes, this machine's limit, hours for all of it."""
    from moai.bench import BenchConfig, measure
    from moai.config import resolve
    from moai.recipes.options import DataConfig
    from moai.training.arguments import TrainConfig

    resolved = resolve([DataConfig, BenchConfig], argv, os.environ, prog="python -m moai bench", description=bench.__doc__ or "", others=[TrainConfig])
    for line in measure(resolved[DataConfig], resolved[BenchConfig], resolved.origins).lines():
        print(line)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check a prepared directory: sizes, rows, hashes, token range, a decoded sample; exit 65 if a check fails."""
    from moai.verify import verify as checks

    parser = argparse.ArgumentParser(prog="python -m moai verify", description=verify.__doc__)
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    results = []
    for check in checks(parser.parse_args(list(argv)).directory):
        results.append(check)
        print(check, flush=True)
    failed = sum(not check.ok for check in results)
    print(f"{failed} of {len(results)} checks FAILED" if failed else f"all {len(results)} checks passed")
    return 65 if failed else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"prepare": prepare, "plan": plan, "bench": bench, "verify": verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A person's mistake is one line on standard error and an exit code, never a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help") or words[0] not in COMMANDS:
        print("usage: python -m moai COMMAND [flags]\n\n" + "\n".join(f"  {name:9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()),
              file=sys.stdout if words and words[0] in ("-h", "--help") else sys.stderr)  # fmt: skip
        if words and words[0] not in ("-h", "--help"):
            print(f"\npython -m moai: error: unknown command {words[0]!r}", file=sys.stderr)
        return 0 if words and words[0] in ("-h", "--help") else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return COMMANDS[words[0]](words[1:])
    except MoaiError as error:
        print(f"python -m moai {words[0]}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"python -m moai {words[0]}: stopped; finished shards are kept, run again to go on from them", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def flushed(code: int) -> int:
    """The exit code, once what was printed has really gone out."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"python -m moai: error: standard output: {error.strerror}; what was printed is not whole", file=sys.stderr)
        return StorageError.exit_code
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    return code


if __name__ == "__main__":
    from moai.lean import without_pandas

    without_pandas()
    code = main()
    # What is registered to run at the end runs; taking hundreds of MB of libraries apart piece by piece is left to the kernel.
    atexit._run_exitfuncs()
    os._exit(flushed(code))
