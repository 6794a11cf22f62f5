"""The other two systems: the entity-coref corpus and re-embedding."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from moai.cli import Call
from moai.cli.show import show


def coref(call: Call) -> int:
    from moai.coref import prepare
    from moai.coref.options import CorefConfig

    if call.words[:1] == ["look"]:
        return _coref_look(replace(call, name=f"{call.name} look", words=call.words[1:]))

    resolved = call.settings(CorefConfig)
    return show([prepare(resolved[CorefConfig], origins=resolved.origins)])


def _coref_look(call: Call) -> int:
    from moai.coref.look import look

    parser = call.parser()
    parser.description = "Show samples of a corpus with antecedent and mask drawn on their text."
    parser.add_argument("directory", type=Path, help="the corpus that `coref` printed")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="how many, drawn at random (20)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draw: the same one, the same samples (0)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of text")
    given = call.parsed(parser)
    return show(look(given.directory, samples=given.samples, seed=given.seed, html=given.html))


def reembed(call: Call) -> int:
    from moai.reembedding.command import main

    return main(call.words, os.environ)
