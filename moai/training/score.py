"""Score a saved model on prepared rows:  python -m moai evaluate --model DIR --data PREPARED_DIR

The last line is JSON with all figures. Made with another tokenizer than the model's, the rows are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moai.core.config import option
from moai.core.distributed import ranks
from moai.core.errors import ConfigError, DamagedError, TokenizerError
from moai.core.progress import Waiting
from moai.prepared.manifest import Prepared
from moai.tokenizers.load import load_file
from moai.training.data import PackedCollator
from moai.training.evaluate import HeldOut, evaluate, lines
from moai.training.generate import saved_model
from moai.training.logs import quiet_libraries
from moai.training.token_bytes import TokenBytes


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Evaluation: a model and prepared rows."""

    model: str = option("", "a saved model: final_model/, a checkpoint, or the output_dir of a run")
    data: str = option("", "a prepared directory, as `prepare` prints it")
    eval_rows: int | None = option(None, "rows of each source, the first of it; all without it")
    eval_batch_size: int = option(8, "rows at once")
    bf16: bool = option(False, "compute in bfloat16")
    use_cpu: bool = option(False, "stay on the CPU where there is an accelerator")

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1 or (self.eval_rows is not None and self.eval_rows < 1):
            raise ConfigError(
                f"eval_rows = {self.eval_rows}, eval_batch_size = {self.eval_batch_size}: must be at least 1"
            )

    def require(self) -> ScoreConfig:
        """Raises ConfigError with the missing flag."""
        if not self.model or not self.data:
            raise ConfigError(
                "name both: --model DIR (the model) and --data DIR (what `python -m moai prepare` printed)"
            )
        return self


def score(config: ScoreConfig) -> Iterator[str]:
    """The table and the JSON, in lines. Raises errors of moai.core.errors."""
    import torch

    config = config.require()
    quiet_libraries()
    prepared = Prepared.open(Path(config.data))
    tokenizer = load_file(prepared.path / "tokenizer.json")
    try:
        with Waiting("Loading the model"):
            model, collator = _model(saved_model(Path(config.model)), prepared, tokenizer)
    except (ConfigError, DamagedError) as error:
        raise type(error)(str(error).replace("--pretrained_model", "--model")) from error
    device = torch.accelerator.current_accelerator(check_available=True)
    where = torch.device("cpu") if config.use_cpu or device is None else device
    autocast: Callable[[], AbstractContextManager[Any]] = (
        partial(torch.autocast, where.type, dtype=torch.bfloat16) if config.bf16 else nullcontext
    )
    held_out = HeldOut.of(prepared, limit=config.eval_rows)
    if not held_out.sources:
        raise ConfigError(f"--data {config.data}: has no rows")
    scores = evaluate(
        model.to(where),
        held_out,
        collator,
        TokenBytes(tokenizer),
        ranks({}),
        batch_size=config.eval_batch_size,
        device=where,
        autocast=autocast,
    )
    yield from lines(scores)
    figures = {name: found.figures() for name, found in scores.items()}
    said = {"model": config.model, "data": config.data, "content_digest": prepared.content_digest, "scores": figures}
    yield json.dumps(said, ensure_ascii=False)


def _model(directory: Path, prepared: Prepared, tokenizer: Any) -> tuple[Any, PackedCollator]:
    from moai.training import model as models
    from moai.training.packed_attention import packed_forward_selfcheck

    saved = models.load_config(None, str(directory))
    content = prepared.content
    models.check_fit(saved, ids=content["vocab_size"], seq_len=content["seq_len"])
    if (directory / "tokenizer.json").is_file():
        _check_tokenizer(directory, tokenizer)
    model = models.build_model(saved, pretrained_model=str(directory), attention="sdpa", special_ids={}, seed=0)
    collator = PackedCollator(pad_id=content["tokenizer"]["eos_id"])
    packed_forward_selfcheck(model, collator)
    return model, collator


def _check_tokenizer(directory: Path, tokenizer: Any) -> None:
    """The ids of the rows mean the same to the model; what it has beyond them does not matter."""
    theirs = load_file(directory / "tokenizer.json").get_vocab(with_added_tokens=True)
    other = [
        token for token, index in tokenizer.get_vocab(with_added_tokens=True).items() if theirs.get(token) != index
    ]
    if other:
        raise TokenizerError(
            f"{directory}: its tokenizer gives other ids to {len(other):,} tokens of the data, as {other[0]!r}; "
            f"prepare the text with --tokenizer_path {directory}, and compare the two models by their bits per byte"
        )
