"""Cores, memory, environment variables and package versions, judged against what this process may use."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from moai.core import resources
from moai.core.config import Setting
from moai.core.resources import GB, Machine
from moai.doctor.check import BOOTSTRAP, Check, failed, judged

SHARD_BYTES = 16_000_000
ROW_BYTES = 8192
"""A row of 2048 tokens of 4 bytes."""
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_ARROW_IO_DEFAULT = 8


def check_cores(machine: Machine, environ: Mapping[str, str]) -> Check:
    cpus, host = machine.cpus.value, os.cpu_count() or 1
    set_to = {name: environ.get(name, "") for name in ("DATASET_NUM_PROC", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    excess = ", ".join(f"{name}={text}" for name, text in set_to.items() if text.isdigit() and int(text) > cpus)
    value = f"{cpus} ({machine.cpus.reason}) of {host} CPUs" + (f", exceeded by {excess}" if excess else "")
    remedy = f"at most {cpus}: unset them and source optimize_env.sh" if excess else ""
    return judged("cores", value, remedy, cpus=cpus, host_cpus=host, gpus=machine.gpus)


def check_memory(machine: Machine, environ: Mapping[str, str]) -> Check:
    """Enough for a worker on each CPU, for fewer, or for none."""
    chosen, each = _plan(machine, environ), resources.worker_bytes(SHARD_BYTES)
    available, total, workers = machine.memory_bytes.value, machine.total_memory_bytes, chosen.num_proc.value
    mode = chosen.memory_mode.value
    value = (
        f"{available / GB:.1f} of {total / GB:.1f} GB available ({machine.memory_bytes.reason}), memory mode {mode}, "
        f"num_proc {workers}"
    )
    figures = {"available_bytes": available, "total_bytes": total, "memory_mode": mode, "num_proc": workers}
    if available < each:
        remedy = f"one worker needs about {each / GB:.1f} GB: free memory or raise the container's limit"
        return failed("memory", value, remedy, **figures)
    remedy = (
        f"memory allows num_proc {workers} on {machine.cpus.value} CPUs, at {each / GB:.1f} GB each: free some or "
        f"raise the limit"
    )
    return judged("memory", value, remedy if workers < machine.cpus.value else "", **figures)


def check_environment(machine: Machine, environ: Mapping[str, str]) -> list[Check]:
    """One check for each variable that optimize_env.sh would set."""
    names = resources.exports(machine, {})
    fitting = resources.exports(machine, {name: value for name, value in environ.items() if name not in names})
    return [_check_variable(name, environ.get(name, ""), fit, machine, environ) for name, fit in fitting.items()]


def check_versions() -> Check:
    """What pyproject.toml asks for, from the packages' metadata: nothing is imported."""
    found, wrong = [f"python {sys.version.split()[0]}"], []
    for name, least in _requirements().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            wrong.append(f"{name} {version} is older than {least}")
    return failed("versions", ", ".join(wrong), BOOTSTRAP) if wrong else judged("versions", ", ".join(found))


def _check_variable(name: str, text: str, fit: Setting, machine: Machine, environ: Mapping[str, str]) -> Check:
    found, export = partial(judged, name, recommended=fit.value), f"export {name}={fit.value}"
    if text == "":
        # Everything else has a good value inside moai; this one the launchers set to 1, which shrinks Arrow's pool too.
        unset = name == "OMP_NUM_THREADS" and fit.value > 1
        remedy = "source optimize_env.sh: torchrun and accelerate set it to 1 otherwise" if unset else ""
        return found(f"not set, {fit.value} fits", remedy)
    least = 0 if name == "DATASET_NUM_PROC" else 1
    if isinstance(fit.value, int) and not (text.isascii() and text.isdigit() and int(text) >= least):
        value = f"{text!r} is not a whole number from {least} up"
        # moai itself refuses a DATASET_* value it cannot read; the libraries ignore theirs.
        if name.startswith("DATASET_"):
            return failed(name, value, export, recommended=fit.value)
        return found(value, export)
    excess = _wrong_text(name, text) if isinstance(fit.value, str) else _excess(name, int(text), fit, machine, environ)
    return found(f"{text} {excess}", export) if excess else found(text)


def _wrong_text(name: str, text: str) -> str:
    if name == "TOKENIZERS_PARALLELISM":
        return "keeps every tokenizer call on one thread" if text.lower() in resources.FALSE_WORDS else ""
    known = _memory_pools()
    return "" if text in known else f"is no pool that Arrow knows here ({', '.join(known)})"


def _excess(name: str, number: int, fit: Setting, machine: Machine, environ: Mapping[str, str]) -> str:
    """What a number that is too large for this machine, or too small for Arrow, leads to; nothing if it fits."""
    cpus, memory = machine.cpus.value, machine.memory_bytes.value
    if name == "DATASET_NUM_PROC":
        need = number * resources.worker_bytes(SHARD_BYTES)
        if number > cpus:
            return f"exceeds {cpus} CPUs"
        return f"may need {need / GB:.1f} of {memory / GB:.1f} GB" if need > memory else ""
    if name == "DATASET_WRITER_BATCH_SIZE":
        waiting = number * ROW_BYTES * _plan(machine, environ).num_proc.value
        return f"lets up to {waiting / GB:.1f} GB of rows wait in memory" if waiting > memory // 2 else ""
    if name == "ARROW_IO_THREADS":
        most = max(cpus, _ARROW_IO_DEFAULT)
        return f"exceeds {most}, more than {cpus} CPUs can use" if number > most else ""
    if name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS") and number > fit.value:
        return f"exceeds {fit.reason}"
    return "makes Arrow compute on one thread" if name == "OMP_NUM_THREADS" and number == 1 < fit.value else ""


def _plan(machine: Machine, environ: Mapping[str, str]) -> resources.Plan:
    return resources.plan(machine, num_proc=None, num_proc_origin="default", local_world_size=1, ranks_wait=True,
                          memory_mode="auto", shard_bytes=SHARD_BYTES, batch_size=1000, environ=environ)  # fmt: skip


def _memory_pools() -> list[str]:
    try:
        import pyarrow
    except ImportError:
        return ["mimalloc", "system"]
    return list(pyarrow.supported_memory_backends())


def _requirements() -> dict[str, str]:
    """Package -> least version; "0" where any will do."""
    if _PYPROJECT.is_file():
        texts = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        texts = [text for text in importlib.metadata.requires("moai") or () if "extra ==" not in text]
    parsed = [re.fullmatch(r"([\w.-]+)(?:\s*>=\s*([\w.]+))?.*", text) for text in texts]
    return {match[1]: match[2] or "0" for match in parsed if match}


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)"""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version.split("+")[0])[:3])
