"""From a prepared directory to final_model/: everything that happens after the data is there.

    [summary] = train(config, [Stage(config, data, prepared)], origins)        # in every rank, after prepare_or_wait

The order matters: no process group before the data is ready; then the ranks agree on the data, rank 0 chooses the
checkpoint, and the model proves that it keeps documents apart, all before the first step.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moai.core import resources
from moai.core.distributed import Ranks, ranks
from moai.core.errors import DamagedError, Interrupted, MoaiError, TokenizerError
from moai.core.progress import Waiting
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows, read_ahead
from moai.pretraining.options import DataConfig
from moai.tokenizers.load import load_tokenizer
from moai.training import checkpoints, report, sharding, sizes, vocabulary
from moai.training import model as models
from moai.training import process_group as group
from moai.training.arguments import TrainConfig
from moai.training.attention import FLASH, choose_attention
from moai.training.data import PackedCollator
from moai.training.evaluate import Evaluation, HeldOut
from moai.training.final_model import FINAL, put, staging
from moai.training.logs import quiet_libraries
from moai.training.loop import PackedTrainer, packed_trainer
from moai.training.machine import (
    allow_tf32,
    choose_device,
    choose_loader_processes,
    half_precision,
    limit_threads,
    schedule_options,
    training_arguments,
)
from moai.training.packed_attention import packed_forward_selfcheck
from moai.training.portable import cast_weights
from moai.training.stages import Stage, link, remaining
from moai.training.steps import Steps, plan_run
from moai.training.stop import Word
from moai.training.token_bytes import TokenBytes
from moai.training.trackers import same_run
from moai.transforms.chat import turn_ends
from moai.transforms.template import ChatTemplate

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig, stages: Sequence[Stage], origins: Mapping[str, str], *, environ: Mapping[str, str] = os.environ
) -> list[report.Summary]:
    """Train stage after stage, and leave a model for each. Every rank calls this; all raise the same MoaiError where
    they must agree.
    """
    import torch

    assert not torch.distributed.is_initialized(), (
        "a process group existed while data was prepared: its timeout would have run"
    )
    quiet_libraries()
    here = ranks(environ)
    to_train = list(remaining(config, stages, restarted=checkpoints.is_restart(environ)))
    to_come = {stage.config.output_dir for stage in to_train}
    finished = [stage for stage in stages if stage.config.output_dir not in to_come]
    if finished and here.rank == 0:
        link(finished[-1])  # it has its model, and a kill may have come before the other names
    if not to_train:
        logger.info("All %d stages are finished: %s", len(stages), Path(config.output_dir) / FINAL)
    summaries = [_train(stage, origins, here, environ) for stage in to_train]
    group.leave(here)
    return summaries


def _train(stage: Stage, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str]) -> report.Summary:
    import torch

    config = stage.config
    if stage.prepared.memory_mode == "memory" and here.local_rank == 0:
        logger.info("Reading %.1f GB of rows ahead into memory", read_ahead(PackedRows.of(stage.prepared)) / 1e9)
    try:
        with same_run(config, is_resumed=bool(config.resume_from_checkpoint) or checkpoints.is_restart(environ)):
            return _train_and_save(stage, origins, here, environ)
    except torch.OutOfMemoryError as error:
        raise MoaiError(
            f"the accelerator's memory is full at batch_size {config.batch_size}: halve --batch_size and double "
            f"--gradient_accumulation_steps, or set --gradient_checkpointing"
        ) from error
    except DamagedError as error:  # of a process that reads rows: torch puts its traceback in front
        raise DamagedError(
            str(error).rpartition(f"{DamagedError.__module__}.{DamagedError.__name__}: ")[2].strip()
        ) from error
    except RuntimeError as error:
        if not group.is_broken(error):
            raise
        raise MoaiError(
            f"a rank ended or hung in the middle of training, or cannot be reached; its own last lines say why "
            f"({config.output_dir}/logs), and --resume_from_checkpoint auto goes on from the newest checkpoint "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _train_and_save(
    stage: Stage, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str]
) -> report.Summary:
    word = Word()
    with Waiting("Loading the model"):
        trainer, resumed_from = _set_up(stage, origins, here, environ, word)
    # Not before: those of a run that is refused are not those of the run that lies there.
    if here.rank == 0 and stage.settings:
        report.save_settings(stage.run or Path(stage.config.output_dir), stage.settings)
    if resumed_from:
        from transformers import TrainerState

        with checkpoints.loading(resumed_from, "trainer_state.json"):
            TrainerState.load_from_json(str(resumed_from / "trainer_state.json"))
    with word.heard(group.everyone(here)):
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    if word.agreed:
        raise _stopped(trainer, signal.Signals(word.agreed))
    # All wait for the rank that writes: the next stage begins with what it wrote.
    summaries = group.together(lambda: _save(trainer, stage, resumed_from), here)
    trainer.accelerator.free_memory()
    return summaries[here.rank]


def _stopped(trainer: PackedTrainer, by: signal.Signals) -> Interrupted:
    step = trainer.state.global_step
    checkpoint = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
    stopped = Interrupted(
        f"stopped by {by.name}, with {checkpoint} saved at step {step}; --resume_from_checkpoint auto goes on from it",
        by,
    )
    stopped.add_note(group.SHARED)
    return stopped


def _set_up(
    stage: Stage, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str], word: Word
) -> tuple[PackedTrainer, Path | None]:
    """The trainer, ready for its first step, and the checkpoint to go on from."""
    config, data, prepared = stage.config, stage.data, stage.prepared
    # Takes seconds, more on some ranks than on others: so before a collective can time out.
    importlib.import_module("transformers.trainer")
    tokenizer, digest = load_text_tokenizer(data)
    ends = _take_template(tokenizer, prepared)
    rows = PackedRows.of(prepared)
    arguments = _join(config, origins, here, environ)
    _agree(stage, digest, here)
    plan = plan_run(prepared.manifest, config, here, restarted=checkpoints.is_restart(environ))
    arguments.max_steps = plan.steps.last
    arguments.lr_scheduler_kwargs = schedule_options(config, plan.steps.last)
    model = _model(config, prepared, tokenizer, arguments)
    if ends and model.can_generate():
        model.generation_config.eos_token_id = list(dict.fromkeys((tokenizer.eos_token_id, *ends)))
    if config.mode == "pretrain":
        _say_budget(config, prepared, plan.steps, model, arguments)
    collator = _collator(config, prepared, tokenizer, model)
    trainer = packed_trainer(
        plan=plan,
        keep=config.save_total_limit,
        here=here,
        word=word,
        model=model,
        args=arguments,
        train_dataset=rows,
        beside=prepared.beside,
        data_collator=replace(collator, beside=prepared.beside),
        processing_class=tokenizer,
        evaluation=_evaluation(config, stage.held_out, collator, tokenizer),
    )
    sharding.check(trainer)
    flash = model.config._attn_implementation == FLASH
    packed_forward_selfcheck(trainer.model, collator, autocast=half_precision(config) if flash else None)
    if arguments.device.type == "cuda":
        allow_tf32()  # after the check: it rounds more than the check allows in 32 bits
    return trainer, plan.resumed_from


def _take_template(tokenizer: Any, prepared: Prepared) -> list[int]:
    """Give the tokenizer the template of conversations, which may be another than its own and goes with the model.
    Returns the ids that turns end with.
    """
    chat = prepared.content.get("chat")
    if not chat:
        return []
    template = ChatTemplate(**chat["template"])
    both = {"default": template.source, "tool_use": template.with_tools}
    tokenizer.chat_template = both if template.with_tools else template.source
    ends = turn_ends(template, [token.content for token in tokenizer.added_tokens_decoder.values()])
    return list(tokenizer.convert_tokens_to_ids(ends))


def _join(config: TrainConfig, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str]) -> Any:
    """transformers' arguments, and with them the process group."""
    use_cpu = choose_device(config, here)
    sharding.check_launch(environ, on_cpu=use_cpu.value, rank=here.rank)
    cpus = resources.detect(Path(config.output_dir), environ=environ).cpus
    processes = choose_loader_processes(config, origins, cpus, here)
    if use_cpu.value:
        limit_threads(cpus, here)
        group.join_on_cpu(here, timeout_seconds=config.ddp_timeout, environ=environ)
    arguments = training_arguments(config, use_cpu=use_cpu.value, loader_processes=processes.value)
    logger.info("Device: %s x %d ranks: %s", arguments.device.type, here.world_size, use_cpu.reason)
    logger.info("dataloader_num_workers = %d: %s", processes.value, processes.reason)
    return arguments


def _agree(stage: Stage, digest: str, here: Ranks) -> None:
    """One set of data for all ranks, made with the tokenizer that will be saved beside the model."""
    held_out = stage.held_out.content_digest if stage.held_out else None
    group.agree(
        {"content_digest": stage.prepared.content_digest, "held_out": held_out, "tokenizer_digest": digest}, here
    )
    made_with = stage.prepared.content["tokenizer_digest"]
    if digest != made_with:
        raise TokenizerError(
            f"{stage.data.tokenizer_path}: its tokenizer.json is {digest[:16]}, the data was made with "
            f"{made_with[:16]}; it changed meanwhile, start again"
        )


def _model(config: TrainConfig, prepared: Prepared, tokenizer: Any, arguments: Any) -> Any:
    content = prepared.content
    pretrained = config.pretrained_model
    ids = max(len(tokenizer), content["vocab_size"])
    model_config = _model_config(config, ids, content["seq_len"])
    models.check_fit(model_config, ids=ids, seq_len=content["seq_len"], pretrained=bool(pretrained))
    wish = "flash" if config.flash_attention else config.attention
    on_gpu = arguments.device.type == "cuda"
    attention = choose_attention(
        wish, models.architecture(model_config), on_gpu=on_gpu, half=config.bf16 or config.fp16
    )
    if pretrained and arguments.process_index == 0:
        vocabulary.warn_of_moved_ids(Path(pretrained), tokenizer)
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    model = models.build_model(
        model_config,
        pretrained_model=pretrained,
        attention=attention.value,
        special_ids=special_ids,
        seed=config.seed,
        ids=ids,
        device=str(arguments.device),
    )
    total, body = models.count_parameters(model)
    size = f"{total:,} parameters ({body:,} without embeddings)"
    logger.info("Model: %s, %s, %s attention (%s)", type(model).__name__, size, attention.value, attention.reason)
    if wish == "flash" and attention.value != FLASH and arguments.process_index == 0:
        logger.warning("--attention flash: %s; using %s", attention.reason, attention.value)
    return model


def _model_config(config: TrainConfig, ids: int, seq_len: int) -> Any:
    if not config.model_size or config.pretrained_model:
        return models.load_config(config.model_config, config.pretrained_model)
    if config.model_config:
        logger.info(
            "--model_size %s says the shape; --model_config %s is not read", config.model_size, config.model_config
        )
    return models.config_of_size(config.model_size, vocab_size=ids, seq_len=seq_len)


def _say_budget(config: TrainConfig, prepared: Prepared, steps: Steps, model: Any, arguments: Any) -> None:
    """Tokens a parameter, passes and hours of this run, before it begins."""
    import torch

    content = prepared.content
    tokens_per_row = content["tokens"] / max(1, content["rows"])
    head = model.get_output_embeddings()
    _, body = models.count_parameters(model)
    dtype = half_precision(config) if config.bf16 or config.fp16 else torch.float32
    flops = sizes.matrix_flops(arguments.device, dtype)
    line = sizes.budget(
        parameters=body + (head.weight.numel() if head is not None else 0),
        tokens=round(steps.position(steps.last) * tokens_per_row),
        distinct_tokens=content["tokens"],
        flops_per_second=flops * arguments.world_size,
    )
    logger.info("Budget: %s", line)


def _collator(config: TrainConfig, prepared: Prepared, tokenizer: Any, model: Any) -> PackedCollator:
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PackedCollator(
        pad_id=pad_id,
        pad_to=prepared.content["seq_len"] if config.compile else None,
        flatten=model.config._attn_implementation == FLASH,
    )


def _evaluation(
    config: TrainConfig, prepared: Prepared | None, collator: PackedCollator, tokenizer: Any
) -> Evaluation | None:
    if prepared is None:
        return None
    held_out = HeldOut.of(prepared, limit=config.eval_rows)
    rows = ", ".join(f"{name} {len(rows):,} rows" for name, rows in held_out.sources.items())
    logger.info("Held out: %s", rows or "no row, so nothing is evaluated")
    if not held_out.sources:
        return None
    bytes_of = TokenBytes(tokenizer.backend_tokenizer)
    return Evaluation(
        held_out=held_out, collator=collator, bytes_of=bytes_of, batch_size=config.batch_size, every=config.eval_steps
    )


def load_text_tokenizer(data: DataConfig) -> tuple[Any, str]:
    """The tokenizer that made the ids, as transformers loads it, and the sha256 of its tokenizer.json. Raises
    TokenizerError.

    The class that reads tokenizer.json as it stands, and no other: classes of single models rebuild parts of it.
    """
    from transformers import PreTrainedTokenizerFast

    spec = load_tokenizer(data.tokenizer_path, eos_token=data.eos_token, need_bos=data.add_bos)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(Path(spec.path).parent), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever a damaged configuration makes it raise
        raise TokenizerError(
            f"{Path(spec.path).parent}: transformers cannot load this tokenizer ({' '.join(str(error).split())[:200]})"
        ) from error
    tokenizer.eos_token = spec.eos_token
    return tokenizer, spec.digest


def _save(trainer: PackedTrainer, stage: Stage, resumed_from: Path | None) -> report.Summary:
    """final_model/ with tokenizer and card, and summary.json, written by rank 0."""
    prepared, output = stage.prepared, Path(stage.config.output_dir)
    final = output / FINAL
    total, body = models.count_parameters(trainer.model)
    first, last = report.losses(trainer.state.log_history)
    nothing_left = trainer.plan.steps.first == trainer.plan.steps.last
    summary = (report.Summary.load(output) if nothing_left else None) or report.Summary(
        prepared=", ".join(map(str, stage.data.dataset)) if stage.config.prepared else str(prepared.path),
        content_digest=prepared.manifest["content_digest"],
        **report.data_figures(prepared.content),
        loss_first=first,
        loss_last=last,
        parameters=total,
        parameters_without_embeddings=body,
        steps=trainer.state.global_step,
        tokens_seen=trainer.clock.tokens,
        tokens_per_second=round(trainer.clock.tokens_per_second, 1),
        seconds=round(trainer.clock.seconds, 2),
        resumed_from=str(resumed_from) if resumed_from else None,
        final_model=str(final),
        output_dir=str(output),
    )
    card = report.model_card(
        summary, content=prepared.content, architecture=type(trainer.model).__name__.removeprefix("FSDP")
    )
    with checkpoints.storing(final):
        staged = staging(final, writes=trainer.args.should_save)
        trainer.save_model(str(staged))
        if trainer.args.should_save:
            (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody who loads a model needs it
            if stage.config.save_dtype != "float32":
                cast_weights(staged, stage.config.save_dtype)
            (staged / "README.md").write_text(card, encoding="utf-8")
            summary.save()
            put(staged, final)  # a stage that has it is not begun again
            link(stage)
    return summary
