"""Commands over models and what they stand on: tokenizers and the machine."""

from __future__ import annotations

import os
from pathlib import Path

from moai.cli import Call
from moai.cli.show import show
from moai.core.without_pandas import with_pandas


def train(call: Call) -> int:
    with_pandas()  # torch looks for it
    from moai.training.command import main

    return main(call.words, os.environ, prog=call.prog)


def evaluate(call: Call) -> int:
    with_pandas()
    from moai.training.score import ScoreConfig, score

    return show(score(call.settings(ScoreConfig)[ScoreConfig]))


def generate(call: Call) -> int:
    with_pandas()
    from moai.training.generate import GenerateConfig
    from moai.training.generate import generate as write

    config = call.settings(GenerateConfig)[GenerateConfig].require()
    write(config, write=lambda text: print(text, end="", flush=True))
    return 0


def training(call: Call) -> int:
    from moai.training.page import show as lines

    parser = call.parser()
    parser.add_argument("directory", type=Path, help="the run's --output_dir")
    return show(lines(call.parsed(parser).directory))


def tokenizer(call: Call) -> int:
    from moai.tokenizers.train import main

    return main(call.words, prog=call.prog)


def doctor(call: Call) -> int:
    from moai.doctor import main

    return main(call.words, os.environ, prog=call.prog)
