"""Commands over what is there already: caches, prepared directories, launches."""

from __future__ import annotations

from pathlib import Path

from moai.cli import Call
from moai.cli.show import show
from moai.core.stopping import stoppable


def status(call: Call) -> int:
    from moai.cli.prepare import ONE_FILE
    from moai.pretraining.status import StatusConfig
    from moai.pretraining.status import show as lines

    return show(lines(call.settings(StatusConfig, others=ONE_FILE)[StatusConfig]))


def inspect(call: Call) -> int:
    from moai.prepared.inspect import inspect as lines

    parser = call.parser()
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    parser.add_argument("--rows", type=int, default=10, metavar="N", help="how many rows are shown (10)")
    parser.add_argument("--random", action="store_true", help="rows from everywhere instead of the first ones")
    parser.add_argument("--source", metavar="NAME", help="rows of this source only")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of text")
    given = call.parsed(parser)
    chosen = {"rows": given.rows, "at_random": given.random, "source": given.source}
    return show(lines(given.directory, html=given.html, **chosen))


def view(call: Call) -> int:
    from moai.view.command import add_arguments
    from moai.view.command import view as serve

    parser = call.parser()
    add_arguments(parser)
    serve(call.parsed(parser))
    return 0


def verify(call: Call) -> int:
    from moai.prepared.verify import verify as checks

    parser = call.parser()
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    every = "hash every file, compare every token id and every row's pieces"
    parser.add_argument("--full", action="store_true", help=every)
    given = call.parsed(parser)
    results = []
    for check in checks(given.directory, full=given.full):
        results.append(check)
        print(check, flush=True)
    failed = sum(not check.ok for check in results)
    if failed:
        print(f"{failed} of {len(results)} checks FAILED")
        return 65
    print(f"all {len(results)} checks passed{'' if given.full else '; --full hashes every byte'}")
    return 0


def repair(call: Call) -> int:
    from moai.pretraining.repair import repair as lines

    parser = call.parser()
    parser.add_argument("directory", type=Path, help="the prepared directory")
    where = "where the input is now, in the order it was given to prepare"
    parser.add_argument("--dataset", nargs="+", default=[], metavar="X", help=where)
    copy = "a copy of the tokenizer, if the directory's own is damaged"
    parser.add_argument("--tokenizer_path", default="", metavar="DIR", help=copy)
    given = call.parsed(parser)
    with stoppable("what was repaired stays, run again for the rest"):
        return show(lines(given.directory, dataset=given.dataset, tokenizer_path=given.tokenizer_path))


def gc(call: Call) -> int:
    from moai.cache.gc.collect import GcConfig, collect
    from moai.cli.prepare import ONE_FILE

    config = call.settings(GcConfig, others=ONE_FILE)[GcConfig]
    with stoppable("nothing is half removed"):
        return show(collect(config))


def export(call: Call) -> int:
    from moai.prepared.export import FORMATS

    parser = call.parser()
    parser.add_argument("directory", type=Path, help="the prepared directory that `prepare` printed")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="the trainer")
    where = "where to write; for megatron OUT.bin and OUT.idx, neither of which may be there"
    parser.add_argument("out", type=Path, help=where)
    given = call.parsed(parser)
    with stoppable("nothing was exported, run again"):
        return show(FORMATS[given.to](given.directory, given.out))


def completion(call: Call) -> int:
    from argcomplete.shell_integration import shellcode

    call.parsed(call.parser())
    return show([shellcode(["moai"])])
