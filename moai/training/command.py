"""`moai train`, which is train.py too: prepare the data, or wait for rank 0 to do it, then train.

Runs under torchrun, accelerate launch and plain python. Nothing heavy is imported at its top: worker processes may
import it again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moai.core.config import Resolved, resolve
from moai.core.distributed import ranks
from moai.core.errors import Interrupted, MoaiError
from moai.core.stopping import stoppable
from moai.core.terminal import printing
from moai.pretraining.options import DataConfig, SaveConfig
from moai.training.arguments import AUTO, TrainConfig
from moai.training.process_group import SHARED
from moai.training.stop import end_with_launcher

if TYPE_CHECKING:
    from moai.prepared.manifest import Prepared

logger = logging.getLogger("moai.train")


@printing()
def main(argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "train.py") -> int:
    end_if_launcher_is_gone = end_with_launcher(environ)
    try:
        with stoppable(
            "finished shards and checkpoints are kept, --resume_from_checkpoint auto goes on from the newest"
        ):
            run(argv, environ, prog=prog)
    except MoaiError as error:
        end_if_launcher_is_gone()
        say(f"{prog}: {'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", error, environ)
        tell_launcher(error, environ)
        return error.exit_code
    return 0


def run(argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "train.py") -> None:
    description = "From raw text to a trained model."
    resolved = resolve(
        [TrainConfig, DataConfig], argv, environ, prog=prog, description=description, others=[SaveConfig]
    )

    config = resolved[TrainConfig].require()
    data = resolved[DataConfig]
    here = ranks(environ)
    directories: list[Prepared] = []
    if config.prepared:
        from moai.training import prepared_data

        directories = prepared_data.open_all(prepared_data.fetched(config.prepared, data, here, environ))
        data = prepared_data.settings(directories, data, resolved.origins, config)
    data = data.of_mode(config.mode).require()
    from moai.training.checkpoints import is_restart
    from moai.training.finished import finished
    from moai.training.in_use import held
    from moai.training.stages import check_places, stages_of

    settings = stages_of(config, data)
    places = [own for own, _ in settings]
    if config.resume_from_checkpoint == AUTO and not is_restart(environ) and (done := finished(resolved, places)):
        if here.rank == 0:
            print(
                f"Nothing to do: trained {done.steps:,} steps, final model at {done.final_model} (its data was not "
                f"looked at again)"
            )
        return
    check_places(config, places, restarted=is_restart(environ))
    with held(Path(config.output_dir), here, environ):
        _prepare_and_train(resolved, config, data, settings, directories, environ)


def _prepare_and_train(
    resolved: Resolved,
    config: TrainConfig,
    data: DataConfig,
    settings: Sequence[tuple[TrainConfig, DataConfig]],
    directories: Sequence[Prepared],
    environ: Mapping[str, str],
) -> None:
    from moai.training import prepared_data
    from moai.training.logs import start_logging

    here = ranks(environ)
    start_logging(Path(config.output_dir), here.rank)
    if here.rank == 0:
        show_settings(resolved)
    check_model(config, data)

    prepared: dict[DataConfig, Prepared] = {}
    if directories:
        prepared_data.log(directories, evaluates=not config.eval_dataset)
        mode = prepared_data.memory_mode(data, here, environ)
        by_path = {str(one.path): one for one in directories}
        prepared = {
            own: prepared_data.joined([by_path[path] for path in own.dataset], memory_mode=mode) for _, own in settings
        }
        prepared_data.check_mixture(config, prepared.values())

    held_out = [evaluation_data(config, data) for _, data in settings]
    wanted = list(dict.fromkeys([*(data for _, data in settings if data not in prepared), *filter(None, held_out)]))
    if wanted:
        from moai.pretraining.recipe import prepare_all_or_wait

        prepared |= zip(wanted, prepare_all_or_wait(wanted, origins=resolved.origins, environ=environ))

    from moai.training.stages import Stage
    from moai.training.trainer import train

    run = Path(config.output_dir) if config.sequential else None
    table = resolved.table()
    stages = [
        Stage(own, data, prepared[data], prepared[aside] if aside else prepared[data].held_out, run, table)
        for (own, data), aside in zip(settings, held_out)
    ]
    for summary in train(config, stages, resolved.origins, environ=environ):
        if here.rank == 0:
            print("\n".join(summary.lines()), flush=True)


def evaluation_data(config: TrainConfig, data: DataConfig) -> DataConfig | None:
    """What to prepare for evaluation beside `data`."""
    if config.eval_dataset:
        return replace(data, dataset=config.eval_dataset, dataset_config=None, eval_ratio=0.0)
    return replace(data, held_out=True) if data.eval_ratio else None


def show_settings(resolved: Resolved) -> None:
    """Every setting that somebody made, with its value and origin. All of them are in settings.json."""
    table = resolved.table()
    made = {name: entry for name, entry in table.items() if entry["origin"] != "default"}
    width = max(map(len, made), default=0)
    lines = [f"  {name:<{width}}  {entry['value']}  ({entry['origin']})" for name, entry in made.items()]
    logger.info(
        "Settings:\n%s",
        "\n".join(
            [*lines, f"  and {len(table) - len(made)} at their defaults: settings.json in the output_dir lists all"]
        ),
    )


def check_model(config: TrainConfig, data: DataConfig) -> None:
    """Refuse a model that cannot fit before hours are spent on its data."""
    if config.model_size and not config.pretrained_model:  # fits any vocabulary and length
        return
    from moai.tokenizers.load import load_tokenizer
    from moai.training.model import check_early

    local = (
        Path(data.tokenizer_path).expanduser().exists()
    )  # one from the Hub is fetched by rank 0 when it prepares, and checked later
    vocab_size = (
        load_tokenizer(data.tokenizer_path, eos_token=data.eos_token, need_bos=data.add_bos).vocab_size
        if local
        else None
    )
    check_early(
        model_config=config.model_config,
        pretrained_model=config.pretrained_model,
        vocab_size=vocab_size,
        seq_len=data.seq_len,
    )


def say(line: str, error: MoaiError, environ: Mapping[str, str]) -> None:
    """On the console, but what all ranks raise together only once."""
    if SHARED in getattr(error, "__notes__", ()) and ranks(environ).rank:
        logger.info(line)
        return
    print(line, file=sys.stderr)
    if getattr(sys.stderr, "is_gone", False):  # a terminal that was closed: the rank's log remains
        logger.info(line)


def tell_launcher(error: MoaiError, environ: Mapping[str, str]) -> None:
    """Leave the cause where torchrun looks for it, so that its report names it instead of "<N/A>"."""
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {
            "message": {
                "message": str(error),
                "extraInfo": {"py_callstack": str(error), "timestamp": str(int(time.time()))},
            }
        }
        try:
            Path(path).write_text(json.dumps(told), encoding="utf-8")
        except OSError as problem:
            logger.warning("%s: %s", path, problem.strerror)
