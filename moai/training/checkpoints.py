"""Checkpoints: which one is whole, which one a run may go on from, and what the run must know of it.

A crash while a checkpoint is written leaves a directory that looks like one, a disk may lose a block of one that was
whole. `problem` says what is wrong with it; `choose` takes the newest whole one and renames newer broken ones to
`checkpoint-N.incomplete`, so that nobody takes them for one again. A launcher that starts the ranks anew (`is_restart`)
repeats the command of the start, and means: go on from the newest.

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
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError, DamagedError, MoaiError, StorageError
from moai.core.failpoints import failpoint
from moai.core.files import free_bytes
from moai.core.fsops import open_regular, read_regular
from moai.training import history
from moai.training.arguments import AUTO
from moai.training.process_group import is_broken
from moai.training.record import MOST_BYTES, RECORD, Record

logger = logging.getLogger(__name__)

SENTINEL = "checkpoint-is-incomplete.txt"
"""transformers puts this file into a checkpoint it writes on SIGTERM, and removes it when done."""

PLAIN, FSDP, DEEPSPEED = "plain data parallelism", "FSDP", "DeepSpeed"
_OF_FSDP = ("optimizer.bin", "pytorch_model_fsdp.bin")
"""What accelerate writes of an FSDP run instead of optimizer.pt: the optimizer's state and, beside model.safetensors,
the weights once more.
"""


_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What a file that holds something else makes reading it raise."""


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
    return int(_state(checkpoint)["global_step"])


def newest_complete(output_dir: Path) -> Path | None:
    return next((path for path in numbered(output_dir) if problem(path) is None), None)


def problem(checkpoint: Path, *, read: bool = False) -> str | None:
    """What keeps this checkpoint from being one, or None: every file by its kind and size, and if they are to be `read`
    by every byte. Where no digests were taken, ends of archives and headers of weights are all there is to look at.
    """
    if os.path.lexists(checkpoint / SENTINEL):
        return f"{SENTINEL} says that it was being written"
    name = RECORD
    try:
        record = Record.load(checkpoint)
        if damage := record.damage(checkpoint, read=read):
            return damage
        name = "trainer_state.json"
        step = global_step(checkpoint)
        if re.fullmatch(r"checkpoint-[0-9]+", checkpoint.name) and step != step_of(checkpoint):
            return f"{name} is of step {step}"
        if not record.files:
            name = "latest"
            for name in (*_optimizer(checkpoint, record.world_size), "scheduler.pt", *_random_states(record)):
                # torch writes a zip archive, whose directory is at the end: a cut file has none. Nothing is unpickled.
                with open_regular(checkpoint / name) as file:
                    zipfile.ZipFile(file).close()
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        return _why(error, name)
    if not record.files and (cut := weights_problem(checkpoint)):
        return cut
    return _against_history(checkpoint, step, record) if read else None


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
    folder = checkpoint / read_regular(checkpoint / "latest", 1 << 10).decode().strip()
    parts = [
        f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)
    ]  # in bfloat16 with a bf16_ in front
    return [f"{folder.name}/{next((found.name for found in folder.glob(f'*{part}')), part)}" for part in parts]


def _random_states(record: Record) -> list[str]:
    return (
        ["rng_state.pth"] if record.world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(record.world_size)]
    )


def _state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json, of the shape that transformers and history.jsonl take. Raises one of _UNREADABLE."""
    state: dict[str, Any] = json.loads(read_regular(checkpoint / "trainer_state.json", MOST_BYTES))
    if not all(isinstance(line, dict) for line in list(state["log_history"])) or state["global_step"] < 0:
        raise ValueError("not the state of a trainer")
    return state


def _against_history(checkpoint: Path, step: int, record: Record) -> str | None:
    """That the run logged another position at this step: rows would be trained on twice, or never."""
    try:
        entries = history.read(checkpoint.parent / history.NAME)
    except (OSError, ValueError):
        return None  # it is no part of a checkpoint, and a run may lack it
    for name, here in (("position", record.position), ("tokens", record.tokens_seen)):
        logged = [line[name] for line in entries if line["kind"] == "train" and line["step"] == step and name in line]
        if logged and here not in logged:
            return f"{RECORD} says {name} {here:,}, {history.NAME} at step {step} {logged[-1]}"
    return None


def weights_problem(directory: Path) -> str | None:
    """What keeps `directory` from holding a saved model (config.json and safetensors, whole or in shards), or None.
    Weights are looked at by their header and size, not read.
    """
    index = directory / "model.safetensors.index.json"
    name = "config.json"
    try:
        if not isinstance(_json(directory / name), dict):
            return f"{name} is not a configuration"
        name = index.name
        names = ["model.safetensors"]
        if os.path.lexists(index):
            names = sorted(set(_json(index)["weight_map"].values()))
        for name in names:
            if cut := _safetensors_problem(directory / name):
                return cut
    except _UNREADABLE as error:
        return _why(error, name)
    return None


def is_restart(environ: Mapping[str, str]) -> bool:
    """torchrun started these ranks because one of those before them died (`--max-restarts`)."""
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def check_place(wish: str | None, output_dir: Path, *, restarted: bool = False) -> None:
    """Refuse early, before hours of preparation, what `choose` would refuse. Changes nothing, and reads no weights.
    Raises ConfigError.
    """
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
    if wish not in (None, AUTO):
        _check_named(Path(str(wish)), read=False)


def _check_named(checkpoint: Path, *, read: bool) -> None:
    if reason := problem(checkpoint, read=read):
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: not a complete checkpoint ({reason}); 'auto' takes the newest "
            f"complete one of --output_dir"
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
    if chosen is not None and chosen == named:
        _check_named(named, read=True)
    if chosen is not None:
        _check_record(chosen, expected)
        if not Record.load(chosen).files:
            logger.warning(
                "%s: no digests were taken when it was saved, so damage inside its files is not seen", chosen
            )
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


@contextlib.contextmanager
def loading(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """What torch and transformers raise over a file that is not what they take it for, as DamagedError. Only tensors,
    numbers and plain containers are ever unpickled.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MoaiError) or type(error).__name__ == "OutOfMemoryError" or is_broken(error):
            raise
        text = " ".join(str(error).split())
        why = f"{type(error).__name__}: {text[:200]}"
        if "weights_only" in text:
            why = "it holds other objects than tensors and numbers, which are never loaded"
        raise DamagedError(
            f"{checkpoint}: its {what} cannot be loaded ({why}); move that directory away, and "
            f"--resume_from_checkpoint auto takes the next older one"
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
        reason = problem(path, read=True)
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
    try:
        return path.rename(aside)
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}, so it cannot be renamed to {aside.name}; move it away"
        ) from error


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
    with open_regular(path, follow_links=True) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= size - 8:
            return f"{path.name} is cut inside its header"
        header: dict[str, Any] = json.loads(file.read(length))
    end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    return None if 8 + length + end == size else f"{path.name} has {size} bytes, its header asks for {8 + length + end}"


def _json(path: Path) -> Any:
    """Of a model, whose files may be links into a cache."""
    with open_regular(path, follow_links=True) as file:
        return json.loads(file.read())


def _why(error: Exception, name: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name if error.filename else name} is missing"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{name} is damaged ({kind}{error})"
