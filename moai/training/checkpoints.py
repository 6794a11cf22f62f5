"""Checkpoints: which one is whole, which one a run may go on from, and what the run must know of it.

A crash while a checkpoint is written leaves a directory that looks like one. `problem` says what it lacks; `choose`
takes the newest whole one and renames newer broken ones to `checkpoint-N.incomplete`, so that nobody takes them for one
again. A launcher that starts the ranks anew (`is_restart`) repeats the command of the start, and means: go on from the
newest.

    choose("auto", Path("outputs/demo"), expected)         # rank 0, before training -> outputs/demo/checkpoint-80
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError, StorageError
from moai.core.failpoints import failpoint
from moai.core.files import free_bytes, write_atomic
from moai.training.arguments import AUTO

logger = logging.getLogger(__name__)

RECORD = "moai_data.json"
SENTINEL = "checkpoint-is-incomplete.txt"
"""transformers puts this file into a checkpoint it writes on SIGTERM, and removes it when done."""

PLAIN, FSDP, DEEPSPEED = "plain data parallelism", "FSDP", "DeepSpeed"
_OF_FSDP = ("optimizer.bin", "pytorch_model_fsdp.bin")
"""What accelerate writes of an FSDP run instead of optimizer.pt: the optimizer's state and, beside model.safetensors,
the weights once more.
"""
_TYPES = {"content_digest": str, "order": dict}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint was trained on, saved in it as moai_data.json: the data, its order, and how far in it.

    order        what decides the order beside the data: its version, seed and window, and the mixture as `asked` for
                 and as resolved to `shares`
    position     rows of that order that were trained on, over all ranks and since the run began
    tokens_seen  trained tokens, likewise
    """

    content_digest: str
    rows: int
    order: dict[str, Any]
    world_size: int
    rows_per_step: int
    position: int = 0
    tokens_seen: int = 0

    def save(self, checkpoint: Path) -> None:
        write_atomic(checkpoint / RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, checkpoint: Path) -> Record:
        """Raises OSError, ValueError, KeyError or TypeError when it is absent or not a record."""
        found = json.loads((checkpoint / RECORD).read_bytes())
        values = {field.name: found[field.name] for field in fields(cls)}
        if any(
            isinstance(value, bool) or not isinstance(value, _TYPES.get(name, int)) for name, value in values.items()
        ):
            raise ValueError("not a record of moai")
        return cls(**values)


def numbered(output_dir: Path) -> list[Path]:
    """`checkpoint-N` directories, newest (highest N) first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-[0-9]+", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def global_step(checkpoint: Path) -> int:
    """The step it was saved at, whatever it is named."""
    return int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"])


def newest_complete(output_dir: Path) -> Path | None:
    return next((path for path in numbered(output_dir) if problem(path) is None), None)


def problem(checkpoint: Path) -> str | None:
    """What keeps this checkpoint from being one, or None. Weights are checked by their header and size, not read."""
    if (checkpoint / SENTINEL).exists():
        return f"{SENTINEL} says that it was being written"
    try:
        step = global_step(checkpoint)
        record = Record.load(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _why(error, f"trainer_state.json or {RECORD}")
    if re.fullmatch(r"checkpoint-[0-9]+", checkpoint.name) and step != step_of(checkpoint):
        return f"trainer_state.json is of step {step}"
    random_states = (
        ["rng_state.pth"] if record.world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(record.world_size)]
    )
    for name in (*_optimizer(checkpoint, record.world_size), "scheduler.pt", *random_states):
        try:
            # torch writes a zip archive, whose directory is at the end: a cut file has none. Nothing is unpickled.
            zipfile.ZipFile(checkpoint / name).close()
        except (OSError, zipfile.BadZipFile) as error:
            return _why(error, name)
    return weights_problem(checkpoint)


def written_by(checkpoint: Path) -> str:
    """PLAIN, FSDP or DEEPSPEED: each keeps the optimizer in files of its own."""
    if (checkpoint / "latest").exists():
        return DEEPSPEED
    return FSDP if any((checkpoint / name).exists() for name in _OF_FSDP) else PLAIN


def _optimizer(checkpoint: Path, world_size: int) -> list[str]:
    """The files that hold the optimizer's state; a name that is not there where one is missing."""
    kind = written_by(checkpoint)
    if kind != DEEPSPEED:
        return ["optimizer.pt"] if kind == PLAIN else [*_OF_FSDP]
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    parts = [
        f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)
    ]  # in bfloat16 with a bf16_ in front
    return [f"{folder.name}/{next((found.name for found in folder.glob(f'*{part}')), part)}" for part in parts]


def weights_problem(directory: Path) -> str | None:
    """What keeps `directory` from holding a saved model (config.json and safetensors, whole or in shards), or None."""
    index = directory / "model.safetensors.index.json"
    name = "config.json"
    try:
        if not isinstance(json.loads((directory / name).read_bytes()), dict):
            return f"{name} is not a configuration"
        name = index.name
        names = (
            sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        for name in names:
            if cut := _safetensors_problem(directory / name):
                return cut
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _why(error, name)
    return None


def is_restart(environ: Mapping[str, str]) -> bool:
    """torchrun started these ranks because one of those before them died (`--max-restarts`)."""
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def check_place(wish: str | None, output_dir: Path, *, restarted: bool = False) -> None:
    """Refuse early, before hours of preparation, what `choose` would refuse. Changes nothing. Raises ConfigError."""
    if restarted:
        return
    there = numbered(output_dir)
    if wish is None and there:
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run already (newest: {there[0].name}); go on with it by "
            f"--resume_from_checkpoint auto, or name another --output_dir"
        )
    if wish == AUTO and not there:
        raise ConfigError(
            f"--resume_from_checkpoint auto: {output_dir} has no checkpoint; the same command without "
            f"--resume_from_checkpoint starts the run that makes one"
        )
    if wish not in (None, AUTO) and (reason := problem(Path(str(wish)))):
        raise ConfigError(
            f"--resume_from_checkpoint {wish}: not a complete checkpoint ({reason}); 'auto' takes the newest complete "
            f"one of --output_dir"
        )


def choose(wish: str | None, output_dir: Path, expected: Record, *, restarted: bool = False) -> Path | None:
    """The checkpoint to go on from, or None to start at the beginning. Sets broken and superseded ones aside. Raises
    ConfigError.
    """
    check_place(wish, output_dir, restarted=restarted)
    named = None if wish in (None, AUTO) else Path(str(wish))
    chosen = named
    if restarted or wish == AUTO:
        chosen = _newest_after_cleaning(output_dir) or named
        if chosen is None:
            logger.warning("%s: no complete checkpoint is left, so training starts from the beginning", output_dir)
    if chosen is not None:
        _check_record(chosen, expected)
    if named is not None and chosen == named:
        _set_others_aside(named, output_dir)
    return chosen


def rotate(output_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest. (transformers' own rotation would count `checkpoint-9.incomplete` as the newest
    of all.)
    """
    for path in numbered(output_dir)[keep:]:
        failpoint("checkpoint.rotate", path)
        shutil.rmtree(path, ignore_errors=True)


def check_room(place: Path, needed_bytes: int) -> None:
    """Raises OSError where a checkpoint surely cannot fit, before anything of it is written. What a quota leaves is not
    seen here.
    """
    status = os.statvfs(place.parent)
    free = status.f_frsize * (status.f_bfree if os.geteuid() == 0 else status.f_bavail)
    if status.f_blocks and free < needed_bytes:
        raise OSError(
            errno.ENOSPC, f"it takes {needed_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free", str(place)
        )


@contextlib.contextmanager
def storing(place: Path) -> Iterator[None]:
    """What a full or forbidden disk raises while `place` is written, in whatever words of whichever library, as
    StorageError.
    """
    try:
        yield
    except Exception as error:
        reason = _unwritten(error, place)
        if reason is None:
            raise
        newest = next((path for path in numbered(place.parent) if path != place and problem(path) is None), None)
        way = f"go on from {newest.name} by --resume_from_checkpoint auto" if newest else "start again"
        raise StorageError(
            f"{place}: {reason}, so it is not complete; free space there (a lower --save_total_limit keeps fewer), "
            f"then {way}"
        ) from error


def _unwritten(error: Exception, place: Path) -> str | None:
    """Why a file could not be written, or None when `error` is of another kind. safetensors and torch have errors of
    their own.
    """
    text = str(error)
    number = re.search(r"\(os error (\d+)\)", text)
    if isinstance(error, OSError) and error.errno:
        return error.strerror or os.strerror(error.errno)
    if number:
        return os.strerror(int(number[1]))
    if "inline_container.cc" in text or "PytorchStreamWriter" in text:
        return f"torch could not write all of it, with {free_bytes(place) / 1e9:.2f} GB free there"
    return None


def _newest_after_cleaning(output_dir: Path) -> Path | None:
    for path in numbered(output_dir):
        reason = problem(path)
        if reason is None:
            return path
        logger.warning("%s is incomplete (%s); renamed to %s", path, reason, _rename(path, "incomplete").name)
    return None


def _set_others_aside(named: Path, output_dir: Path) -> None:
    """Checkpoints of `output_dir` that the run about to begin does not come from: neither a restart nor a later `auto`
    may take them for its own.
    """
    step = global_step(named)
    own = named.resolve().parent == output_dir.resolve()
    for path in numbered(output_dir):
        if not own or step_of(path) > step:
            logger.warning(
                "%s does not lead to what %s goes on with; renamed to %s", path, named, _rename(path, "superseded").name
            )


def _rename(path: Path, why: str) -> Path:
    aside = next(
        name
        for number in range(1, 1000)
        if not (name := path.with_name(f"{path.name}.{why}{'' if number == 1 else f'-{number}'}")).exists()
    )
    return path.rename(aside)


def _check_record(checkpoint: Path, expected: Record) -> None:
    """The same data in the same order: else rows would be skipped or repeated unseen. How a step cuts them may be
    another.
    """
    found = Record.load(checkpoint)
    if found.content_digest != expected.content_digest:
        raise ConfigError(
            f"{checkpoint}: was trained on data {found.content_digest}, this run has {expected.content_digest}; resume "
            f"with the same data and data flags, "
            f"or continue on other data with --pretrained_model {checkpoint} and a new --output_dir"
        )
    differing = [
        f"{name} is {there if there not in ([], None) else 'not set'} there, "
        f"{here if here not in ([], None) else 'not set'} here"
        for name, here in {**expected.order, **expected.order["asked"]}.items()
        if name not in ("asked", "shares")
        and (there := {**found.order, **found.order.get("asked", {})}.get(name)) != here
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint}: its rows come in another order than this run's ({'; '.join(differing)}); resume with the "
            f"same flags"
        )


def _safetensors_problem(path: Path) -> str | None:
    """Eight bytes of header length (little-endian), the header in JSON, then the tensors up to the last
    `data_offsets`.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= size - 8:
            return f"{path.name} is cut inside its header"
        header: dict[str, Any] = json.loads(file.read(length))
    end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    return None if 8 + length + end == size else f"{path.name} has {size} bytes, its header asks for {8 + length + end}"


def _why(error: Exception, name: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name if error.filename else name} is missing"
    return f"{name} is damaged ({type(error).__name__}: {error})"
