"""Train a masked language model on the entity-coref corpus.

    python scripts/run_entity_coref_finetune.py --checkpoint DIR --dataset CORPUS

    torchrun --nproc_per_node 8 scripts/run_entity_coref_finetune.py ...

The transformers Trainer on the corpus's own labels, with logits where there is a label, rows of like length padded
together, split by document as the corpus says. No position table is resized: DeBERTa-v2's relative positions are
buckets, the same ones at any length.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from moai.core.config import option
from moai.core.distributed import ranks
from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.coref.mlm import Corpus, PadBatch, RandomMasking, in_batches, load_model, run, span_scores
from moai.coref.mlm_trainer import names_trainer, newest_whole
from moai.training.final_model import FINAL, put, staging

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "bf16", "fp16", "float32")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning: a model, a corpus, and how long."""

    checkpoint: str = option("", "directory or Hub name of the model to go on from")
    model_config: str = option("", "instead of --checkpoint: a DeBERTa-v2 configuration (JSON), trained from nothing")
    dataset: str = option("", "the corpus: the directory that moai entity-coref printed")
    masking: str = option(
        "entity",
        "train on the corpus's labels, or mask at random as the prior program did",
        choices=("entity", "random"),
    )
    seq_len: int | None = option(None, "leave out rows with more tokens; by default the corpus's own length")
    epochs: float = option(5.0, "times through the samples")
    max_steps: int = option(-1, "optimizer steps instead of epochs")
    batch_size: int = option(16, "rows on a device in one step")
    gradient_accumulation: int = option(2, "steps whose gradients make one optimizer step")
    lr: float = option(2e-5, "learning rate at its highest")
    weight_decay: float = option(0.01, "weight decay")
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises")
    eval_steps: int = option(200, "optimizer steps between evaluations, and between checkpoints")
    eval_samples: int = option(30_000, "validation samples looked at, spread evenly over all of them")
    output_dir: str = option(
        "./runs/entity_coref_finetune", "checkpoints, final_model, eval_history.json and final_results.json"
    )
    run_name: str = option("", "a folder of that name under --output-dir")
    precision: str = option(
        "auto", "of the computation: auto is bf16 on a GPU that has it, else float32", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory")
    resume: bool = option(False, "go on from the newest whole checkpoint there, from the beginning without one")
    seed: int = option(42, "of the order of rows, of dropout and of new weights")

    def require(self) -> FinetuneConfig:
        if bool(self.checkpoint) == bool(self.model_config):
            raise ConfigError(
                "name one model: --checkpoint DIR to go on from it, or --model-config FILE to begin from nothing"
            )
        if not self.dataset:
            raise ConfigError("no corpus: set --dataset DIR, the directory that python -m moai entity-coref printed")
        return self


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train; the last evaluation, which is also in final_results.json; nothing in ranks but the first. Raises errors of
    moai.core.errors.
    """
    from transformers import PrinterCallback, set_seed

    config = config.require()
    corpus = Corpus.open(config.dataset)
    if config.masking == "entity" and not corpus.labelled:
        raise ConfigError(
            f"--dataset {config.dataset}: was made in mode text and has no labels; make it in mode span, or train with "
            f"--masking random"
        )
    set_seed(config.seed)
    arguments = _arguments(config, Path(config.output_dir) / config.run_name)  # also joins the other ranks
    model = _new_model(config.model_config) if config.model_config else load_model(config.checkpoint)
    corpus.check_fit(model, config.checkpoint or config.model_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    train = corpus.rows("train", longest=config.seq_len)
    held_out = corpus.rows("validation", most=config.eval_samples, longest=config.seq_len)
    if not len(train) or not len(held_out):
        raise ConfigError(
            f"--dataset {config.dataset}: {len(train)} samples to train on and {len(held_out)} to validate with; both "
            f"are needed (--validation-ratio, --seq-len)"
        )
    tokenizer, output = corpus.tokenizer, Path(config.output_dir) / config.run_name
    pad = PadBatch(pad_id=tokenizer.pad_id)
    random = RandomMasking(
        pad=pad,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.spec.special_ids,
        vocab_size=tokenizer.spec.vocab_size,
        seed=config.seed,
    )
    collator: Any = pad if config.masking == "entity" else random
    trainer = names_trainer(
        lengths=pc.list_value_length(train.with_format("arrow")[:]["input_ids"]).to_numpy(),
        callbacks=[_spoken()],
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the results
    sizes = (len(train), len(held_out), model.num_parameters())
    logger.info("%s samples, %s held out, %s parameters", *(f"{size:,}" for size in sizes))
    newest = newest_whole(output) if config.resume else None
    if config.resume:
        logger.info(
            "--resume: %s", f"from {newest}" if newest else f"no whole checkpoint in {output}, from the beginning"
        )
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    loss = trainer.evaluate()["eval_loss"]
    if not trainer.args.should_save:
        return {}
    staged = staging(output / FINAL)
    trainer.save_model(str(staged))
    for name, data in corpus.files().items():
        write_atomic(staged / name, data)
    put(staged, output / FINAL)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    results: dict[str, Any] = {"masking": config.masking, "steps": trainer.state.global_step, "eval_loss": loss}
    if corpus.labelled:
        results |= asdict(span_scores(model, in_batches(held_out, config.batch_size, pad)))
    for name, value in (("eval_history.json", history), ("final_results.json", results)):
        write_atomic(output / name, json.dumps(value, indent=1).encode())
    return results


def main(argv: Sequence[str]) -> int:
    return run(FinetuneConfig, finetune, argv, prog="run_entity_coref_finetune.py", description=__doc__)


def _new_model(path: str) -> Any:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return DebertaV2ForMaskedLM(DebertaV2Config(**fields))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--model-config {path}: not readable as a DeBERTa-v2 configuration ({error})") from error


def _spoken() -> Any:
    """The Trainer's figures as lines of the log."""
    from transformers import TrainerCallback

    class Spoken(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if not state.is_world_process_zero:
                return
            figures = [f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float)]
            logger.info("step %d: %s", state.global_step, ", ".join(figures))

    return Spoken()


def _arguments(config: FinetuneConfig, output: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = config.precision if config.precision != "auto" else "bf16" if has_bf16 else "float32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU: leave it out, or --precision bf16")
    logger.info(
        "precision = %s%s", precision, "" if config.precision != "auto" else ": the best here that does not overflow"
    )
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=3,
        load_best_model_at_end=True,  # by the loss
        logging_steps=max(1, config.eval_steps // 10),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if ranks(os.environ).world_size > 1 and not torch.cuda.is_available() else None,
        prediction_loss_only=True,
        remove_unused_columns=False,
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
