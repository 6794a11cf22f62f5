"""A training run seen from inside: the clock, the live line, and what is logged, evaluated and kept when.

    step 120/2000  loss 3.4127  lr 2.950e-04  norm 0.812  53,110 tokens/s  wait 0.2%  4.1 GB  12:31 left

`wait` is the share of the time in which the slowest rank asked its loader for a batch and had none yet: what faster
storage or more `--dataloader_num_workers` could win back. The memory is the most this rank has held so far: the
accelerator's, else its own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai.core.progress import Waiting
from moai.training import checkpoints
from moai.training.evaluate import Evaluation
from moai.training.history import NAME, History
from moai.training.order import Order
from moai.training.page import PAGE, write_page
from moai.training.steps import Plan

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = object

logger = logging.getLogger(__name__)

PAGE_SECONDS = 30.0
"""The least time between two writings of training.html, but for the last."""
_NAMED = 4
"""Sources that a live line names."""


class Clock:
    """Tokens per second and share of waiting between two log lines, and tokens per second over the run."""

    def __init__(self, tokens: int) -> None:
        self.first_tokens = self.tokens = tokens
        self.waited = 0.0
        """Seconds this rank has waited for batches since the line before."""
        self.start()

    def start(self) -> None:
        self.started = self.at = time.monotonic()

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time each takes to come is counted."""
        asked = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training."""
        began = time.monotonic()
        yield
        away = time.monotonic() - began
        self.started, self.at = self.started + away, self.at + away

    def tick(self, tokens: int, waited: float) -> dict[str, float]:
        """The figures of a log line, from the trained tokens and the longest wait of all ranks, in seconds."""
        now = time.monotonic()
        span = max(now - self.at, 1e-9)
        rate = (tokens - self.tokens) / span
        self.tokens, self.at, self.waited = tokens, now, 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "tokens_seen": tokens,
            "data_wait": round(min(1.0, waited / span), 4),
            "memory_gb": round(memory_gb(), 3),
        }

    @property
    def seconds(self) -> float:
        return self.at - self.started

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.first_tokens) / self.seconds if self.seconds > 0 else 0.0


class RunCallback(TrainerCallback):
    """Says when to log and to evaluate, writes the live line, history.jsonl and training.html, and keeps the newest
    checkpoints.
    """

    def __init__(self, plan: Plan, clock: Clock, keep: int, evaluation: Evaluation | None) -> None:
        self.plan, self.clock, self.keep, self.evaluation = plan, clock, keep, evaluation
        self.consumption = Consumption(plan.order)
        self.first_step = 0
        self.page_at = -math.inf
        self.starting: Waiting | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The state of a checkpoint has the --save_steps and --logging_steps of the session before.
        state.compute_steps(args, state.max_steps)
        self.first_step = state.global_step
        self.clock.start()
        self.history = History(Path(args.output_dir) / NAME)
        if state.is_world_process_zero:
            sources = self.plan.order.sources
            start = {
                "steps": state.max_steps,
                "position": self.plan.steps.position(state.global_step),
                "rows_per_step": self.plan.steps.rows_per_step,
                "world_size": args.world_size,
                "sources": {source.name: {"rows": source.rows, "tokens": source.tokens} for source in sources},
            }
            self.history.begin(state.global_step, state.log_history, start)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.first_step == state.global_step:
            self.starting = Waiting("First step, which compiles" if args.torch_compile else "First step")
            self.starting.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.starting:
            self.starting.__exit__(None, None, None)
            self.starting = None
        # With the log comes the look at the loss, before weights that are no numbers become the newest checkpoint.
        last = state.global_step >= state.max_steps
        if last or control.should_save:
            control.should_log = True
        # Not when told to stop: whoever told it waits for the checkpoint.
        if self.evaluation and (last or not control.should_training_stop):
            every = self.evaluation.every
            control.should_evaluate = last or (state.global_step % every == 0 if every else control.should_save)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._on_training_line(state, logs)
        elif logs and "eval_loss" in logs:
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, _evaluated(logs))
            if state.is_world_process_zero:
                self.history.add({"kind": "eval", "step": state.global_step, **logs})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save:
            logger.info("Saved %s", Path(args.output_dir) / f"checkpoint-{state.global_step}")
            checkpoints.rotate(Path(args.output_dir), self.keep)
        if state.is_world_process_zero and time.monotonic() - self.page_at >= PAGE_SECONDS:
            self._write_page(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._write_page(args)

    def _on_training_line(self, state: Any, logs: dict[str, float]) -> None:
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.clock.started) / max(done, 1) * (state.max_steps - state.global_step)
        line = live_line(state.global_step, state.max_steps, logs, left)
        if state.is_world_process_zero:
            position = self.plan.steps.position(state.global_step)
            consumed = self.consumption.until(position)
            line += mix_text(consumed, {source.name: source.tokens / source.rows for source in self.plan.order.sources})
            figures = {"tokens" if name == "tokens_seen" else name: value for name, value in logs.items()}
            where = {"kind": "train", "step": state.global_step, "position": position}
            self.history.add({**where, **figures, "consumed": consumed})
        logger.info("%s", line)

    def _write_page(self, args: Any) -> None:
        self.page_at = time.monotonic()
        try:
            write_page(Path(args.output_dir))
        except OSError as error:
            logger.warning("%s: %s is not written (%s)", args.output_dir, PAGE, error.strerror)


class Consumption:
    """Rows of each source before a position that only grows. What came before the first is counted once; after that,
    what is new.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.position: int | None = None
        self.counts: dict[str, int] = {}

    def until(self, position: int) -> dict[str, int]:
        if self.position is None or self.order.mixture is not None:  # a mixture knows without counting
            self.counts = self.order.consumed(position)
        else:
            new = self.order.count(self.position, position)
            self.counts = {name: count + new[name] for name, count in self.counts.items()}
        self.position = position
        return self.counts


def mix_text(consumed: Mapping[str, int], tokens_per_row: Mapping[str, float]) -> str:
    """`  web 62% wiki 38%`: each source's share of the tokens so far, the largest first; nothing for one source."""
    tokens = {name: rows * tokens_per_row[name] for name, rows in consumed.items()}
    whole = sum(tokens.values())
    if len(tokens) < 2 or not whole:
        return ""
    named = sorted(tokens, key=lambda name: -tokens[name])[:_NAMED]
    rest = f" +{len(tokens) - len(named)}" if len(tokens) > len(named) else ""
    return "  " + " ".join(f"{name} {tokens[name] / whole:.0%}" for name in named) + rest


def live_line(step: int, steps: int, logs: dict[str, float], left_seconds: float) -> str:
    return (
        f"step {step}/{steps}  loss {logs['loss']:.4f}  lr {logs.get('learning_rate', math.nan):.3e}  "
        f"norm {logs.get('grad_norm', math.nan):.3g}  {logs['tokens_per_second']:,.0f} tokens/s  "
        f"wait {logs['data_wait']:.1%}  {logs['memory_gb']:.1f} GB  {clock_text(left_seconds)} left"
    )


def _evaluated(logs: Mapping[str, float]) -> str:
    parts = [f"held out: loss {logs['eval_loss']:.4f}", f"{logs['eval_bits_per_byte']:.4f} bits/byte"]
    every = [re.fullmatch("eval_(.*)_bits_per_byte", name) for name in logs]
    of = [found for found in every if found]
    parts += [f"{found[1]} {logs[found[0]]:.4f}" for found in of[:_NAMED]]
    return "  ".join(parts + ([f"+{len(of) - _NAMED}"] if len(of) > _NAMED else []))


def memory_gb() -> float:
    """The most memory held so far, in GB: of the accelerator where there is one, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def clock_text(seconds: float) -> str:
    """`3725` -> `1:02:05`, `65` -> `1:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
