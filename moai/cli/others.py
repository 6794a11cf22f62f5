"""The other two systems: the entity-coref corpus and re-embedding."""

from __future__ import annotations

import os

from moai.cli import Call
from moai.cli.show import show


def coref(call: Call) -> int:
    from moai.coref import prepare
    from moai.coref.options import CorefConfig

    resolved = call.settings(CorefConfig)
    return show([prepare(resolved[CorefConfig], origins=resolved.origins)])


def reembed(call: Call) -> int:
    from moai.reembedding.command import main

    return main(call.words, os.environ)
