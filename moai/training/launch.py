"""What pretrain.sh and pretrain_cont.sh must know before any rank exists, as shell assignments.

    python -m moai.training.launch pretrain|continue [demo|2b|5b|FILE.yaml] [--resume] [train.py flags]

It runs before torch is imported, checks every flag once (so that a wrong one is one line, not one a rank and a
launcher's traceback), and prints: NUM_GPUS for optimize_env.sh, `launcher` (the words before train.py) and `flags` (the
words after it). What it decided goes to standard error for the person who started it.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moai.core import resources
from moai.core.config import Resolved, Setting, resolve
from moai.core.errors import ConfigError, MoaiError
from moai.core.stopping import hangup_is_ignored, stop_at_once
from moai.pretraining.options import DataConfig, SaveConfig
from moai.training.arguments import AUTO, TrainConfig
from moai.training.checkpoints import numbered
from moai.training.final_model import FINAL
from moai.training.finished import differing, ended, finished
from moai.training.report import Summary
from moai.training.sharding import check_launch
from moai.training.stages import check_places, stages_of

NAMES = ("demo", "2b", "5b")
EFFECTIVE_BATCH = 384
"""Rows an optimizer step sees in the 2b and 5b runs, whatever the number and size of the GPUs."""

_ROWS_PER_GPU = {"2b": {32: 4, 48: 12, 80: 24}, "5b": {32: 1, 48: 1, 80: 1}}
_FIRST_PORT, _PORTS = 29500, 200
_NO_GPU = "on the CPU, no NVIDIA GPU found"
_AS_FLAGS = {"OUTPUT_DIR": "--output_dir", "CACHE_DIR": "--cache_dir", "MAX_STEPS": "--max_steps"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run: the configuration file, the flags in front of the user's, and three commands.

    then     trains its model on with the next data
    resume   goes on with the run itself
    anew     is what was typed
    """

    name: str
    config: str
    flags: tuple[str, ...]
    then: str
    resume: str
    anew: str


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Who takes part. `num_gpus` is the number of ranks on this node."""

    num_gpus: Setting
    num_nodes: int
    node_rank: int
    address: str
    port: int
    accelerate_config: str = ""
    """An accelerate configuration file: how the model is divided among the ranks. Who they are is said here all the
    same.
    """

    @property
    def world_size(self) -> int:
        return self.num_nodes * int(self.num_gpus.value)

    def launcher(self) -> list[str]:
        """The words before train.py. One rank needs no launcher, and without one a signal reaches it directly.

        `--multi_gpu` is what makes accelerate 1.15 start ranks the way torchrun does, on a machine without GPUs too
        (with gloo); `--cpu` and `--num_processes 2` alone start one process. Everything a default_config.yaml of the
        user could change about the ranks is said here.
        """
        if self.world_size == 1 and not self.accelerate_config:
            return [".venv/bin/python"]
        how = ["--config_file", self.accelerate_config] if self.accelerate_config else ["--multi_gpu"]
        options = {
            "--gpu_ids": "all", "--mixed_precision": "no", "--dynamo_backend": "no", "--rdzv_backend": "static",
            "--num_processes": self.world_size, "--num_machines": self.num_nodes, "--machine_rank": self.node_rank,
            "--main_process_ip": self.address, "--main_process_port": self.port,
        }  # fmt: skip
        return [
            ".venv/bin/accelerate",
            "launch",
            *how,
            "--same_network",
            *(str(word) for option in options.items() for word in option),
        ]


def main(argv: Sequence[str]) -> int:
    try:
        print(plan(argv, os.environ))
    except MoaiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def plan(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The assignments. Raises ConfigError with the way out; `resolve` ends the process itself on an unknown flag."""
    command, name, given = _command(argv)
    _number(environ, "MAX_STEPS", 1, least=1)
    variables = [
        word for variable, flag in _AS_FLAGS.items() if environ.get(variable) for word in (flag, environ[variable])
    ]
    if command == "continue" and "--resume" in given:
        given.remove("--resume")
        run = _resumed(name, variables, given, environ)
    else:
        run = (_continued if command == "continue" else _first)(name, variables, given, environ)
    resolved = _resolve(run.config, [*run.flags, *given], environ)
    nodes = _nodes(resolved, environ)
    chosen = _batch_flags(run, resolved, nodes, environ)
    if nodes.num_gpus.reason == _NO_GPU:
        chosen += ["--use_cpu", "true"]  # what is not CUDA (Apple's MPS) cannot be shared by ranks
    flags = ["--mode", resolved[TrainConfig].mode, "--config", run.config, *run.flags, *chosen, *given]
    resolved = _resolve(run.config, [*run.flags, *chosen, *given], environ)
    resolved[DataConfig].of_mode(resolved[TrainConfig].mode).require()
    training = resolved[TrainConfig].require()
    places = [own for own, _ in stages_of(training, resolved[DataConfig])]
    if training.resume_from_checkpoint in (None, AUTO) and (done := finished(resolved, places)):
        print("\n".join(_nothing_to_do(run, training, done)), file=sys.stderr)
        return "exit 0"
    if not training.resume_from_checkpoint:
        _check_free(run, resolved, places)
    check_places(training, places)
    print("\n".join(_summary(run, resolved, nodes)), file=sys.stderr)
    return (
        f"NUM_GPUS={nodes.num_gpus.value}\nlauncher=({shlex.join([*_outliving(), *nodes.launcher()])})\n"
        f"flags=({shlex.join(flags)})"
    )


def _outliving() -> list[str]:
    """Under nohup: torch's agent would take SIGHUP all the same, and end the ranks by it."""
    return ["env", "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT"] if hangup_is_ignored() else []


def config_path(name: str) -> str:
    """The YAML file that a name or a path means."""
    if name in NAMES:
        return f"configs/{name}.yaml"
    if not Path(name).is_file():
        raise ConfigError(f"{name}: neither one of {', '.join(NAMES)} nor a configuration file")
    return name


def _command(argv: Sequence[str]) -> tuple[str, str, list[str]]:
    command, *words = argv
    named = words and not words[0].startswith("-")
    return command, words[0] if named else NAMES[0], list(words[1:] if named else words)


def _resolve(config: str, flags: Sequence[str], environ: Mapping[str, str]) -> Resolved:
    return resolve(
        [DataConfig, TrainConfig], ["--config", config, *flags], environ, prog="train.py", others=[SaveConfig]
    )


def _first(name: str, variables: Sequence[str], given: Sequence[str], environ: Mapping[str, str]) -> Run:
    config = config_path(name)
    words = [name, *variables, *given]
    output = _resolve(config, words[1:], environ)[TrainConfig].output_dir
    resume = shlex.join(["./pretrain_cont.sh", name, "--resume", *words[1:]])
    anew = shlex.join(["./pretrain.sh", *words])
    return Run(name=name, config=config, flags=tuple(variables), then=_next(name, output), resume=resume, anew=anew)


def _resumed(name: str, variables: Sequence[str], given: Sequence[str], environ: Mapping[str, str]) -> Run:
    run = _first(name, variables, given, environ)
    output = Path(_resolve(run.config, [*variables, *given], environ)[TrainConfig].output_dir)
    if not any((*output.glob("checkpoint-*"), *output.glob("stage_*/checkpoint-*"), *output.glob(FINAL))):
        raise ConfigError(f"{output}: no checkpoint to resume from; start the run first: ./pretrain.sh {name}")
    return replace(run, flags=(*variables, "--resume_from_checkpoint", AUTO))


def _continued(name: str, variables: Sequence[str], given: Sequence[str], environ: Mapping[str, str]) -> Run:
    """Old weights, new optimizer, next data: from NAME_cont.yaml where there is one, otherwise NAME.yaml with
    --dataset.
    """
    base = config_path(name)
    finished = _resolve(base, [], {})[TrainConfig].output_dir
    own = _continuation(base)
    config = own if Path(own).is_file() else base
    flags: tuple[str, ...] = tuple(variables)
    if config == base:
        flags = ("--pretrained_model", f"{finished}/{FINAL}", "--output_dir", f"{finished}_cont", *variables)
    resolved = _resolve(config, [*flags, *given], environ)
    weights = resolved[TrainConfig].pretrained_model
    if "--pretrained_model" not in given and "--pretrained-model" not in given and not Path(weights or "").is_dir():
        raise ConfigError(
            f"{weights}: no trained model to go on from; train it first: ./pretrain.sh {name} (or name one: "
            f"--pretrained_model DIR)"
        )
    if config == base and resolved.origins["dataset"] != "flag":
        raise ConfigError(
            f"continued pretraining needs the next data: ./pretrain_cont.sh {name} --dataset FILES (or write {own})"
        )
    anew = shlex.join(["./pretrain_cont.sh", name, *variables, *given])
    then = "the same again with --pretrained_model and --dataset, for the data after that"
    return Run(
        name=name, config=config, flags=flags, then=then, resume=f"{anew} --resume_from_checkpoint {AUTO}", anew=anew
    )


def _continuation(base: str) -> str:
    return str(Path(base).with_name(f"{Path(base).stem}_cont{Path(base).suffix}"))


def _next(name: str, output: str) -> str:
    """The command that trains the model in `output` on with the next data."""
    base = config_path(name)
    words = ["./pretrain_cont.sh", name]
    if output != _resolve(base, [], {})[TrainConfig].output_dir:
        words += ["--pretrained_model", f"{output}/{FINAL}"]
    if not Path(_continuation(base)).is_file():
        words += ["--dataset", "FILES"]
    return shlex.join(words)


def _nothing_to_do(run: Run, training: TrainConfig, done: Summary) -> list[str]:
    """That it is trained, where it is, and what comes next."""
    longer = (
        f"--max_steps {2 * training.max_steps}"
        if training.max_steps > 0
        else f"--num_epochs {training.num_epochs + 1:g}"
    )
    lines = [
        f"moai pretraining: {run.name} is trained already, so nothing was started",
        *done.lines(),
        f"Next data     {run.then}",
    ]
    if not training.sequential:
        lines.append(f"More steps    {run.resume} {longer}")
    return [*lines, f"Once more     {_elsewhere(run, training)}"]


def _elsewhere(run: Run, training: TrainConfig) -> str:
    place = shlex.quote(f"{training.output_dir}_again")
    by_flag = re.search("--output[_-]dir", run.anew)  # which wins over the variable
    return f"{run.anew} --output_dir {place}" if by_flag else f"OUTPUT_DIR={place} {run.anew}"


def _check_free(run: Run, resolved: Resolved, places: Sequence[TrainConfig]) -> None:
    """Raises ConfigError, with the commands that lead on, where output_dir holds a run that is not finished or was
    another.
    """
    training = resolved[TrainConfig]
    newest = [path for place in reversed(places) for path in numbered(Path(place.output_dir))[:1]]
    if ended(places):
        found = f"trained with other settings ({'; '.join(differing(resolved))})"
    elif newest:
        found = f"which is not finished (newest: {newest[0].name}); go on with it: {run.resume}"
    else:
        return
    elsewhere = _elsewhere(run, training)
    raise ConfigError(f"{training.output_dir}: holds a run already, {found}; begin this one elsewhere: {elsewhere}")


def _nodes(resolved: Resolved, environ: Mapping[str, str]) -> Nodes:
    num_nodes = _number(environ, "NNODES", 1, least=1)
    node_rank = _number(environ, "NODE_RANK", 0, least=0)
    if node_rank >= num_nodes:
        raise ConfigError(f"NODE_RANK={node_rank}: with NNODES={num_nodes} it runs from 0 to {num_nodes - 1}")
    address = environ.get("MASTER_ADDR") or "127.0.0.1"
    if num_nodes > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"NNODES={num_nodes}: name the node with NODE_RANK=0 that all others can reach, MASTER_ADDR=HOST (and the "
            f"same MASTER_PORT on all)"
        )
    port = _number(environ, "MASTER_PORT", 0, least=1) or (_FIRST_PORT if num_nodes > 1 else free_port())
    config = environ.get("ACCELERATE_CONFIG", "")
    if config:
        _check_accelerate(config)
    return Nodes(
        num_gpus=_ranks_here(resolved, environ),
        num_nodes=num_nodes,
        node_rank=node_rank,
        address=address,
        port=port,
        accelerate_config=config,
    )


def _check_accelerate(path: str) -> None:
    """Raises ConfigError for a file that accelerate would answer with a traceback."""
    import yaml

    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"ACCELERATE_CONFIG={path}: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}; "
            f"configs/accelerate/ has some to choose from"
        ) from error
    kind = fields.get("distributed_type") if isinstance(fields, dict) else None
    if kind not in ("MULTI_GPU", "FSDP", "DEEPSPEED"):
        raise ConfigError(
            f"ACCELERATE_CONFIG={path}: distributed_type {kind} is none of MULTI_GPU, FSDP, DEEPSPEED; "
            f"configs/accelerate/ has one of each"
        )
    check_launch({f"ACCELERATE_USE_{kind}": "true"}, on_cpu=False, rank=0)


def _ranks_here(resolved: Resolved, environ: Mapping[str, str]) -> Setting:
    if environ.get("NUM_GPUS"):
        return Setting(_number(environ, "NUM_GPUS", 0, least=1), "NUM_GPUS")
    if resolved[TrainConfig].use_cpu:
        return Setting(2, "on the CPU, as asked")
    gpus = resources.detect(Path.cwd(), environ=environ).gpus
    return Setting(gpus, "all GPUs") if gpus else Setting(2, _NO_GPU)


def _number(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"{name}={text!r}: must be a whole number of at least {least}")
    return int(text)


def free_port(first: int = _FIRST_PORT) -> int:
    """The first port from `first` on that this machine lets a rendezvous listen on."""
    for port in range(first, first + _PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise ConfigError(f"ports {first} to {first + _PORTS - 1} are all in use; name a free one: MASTER_PORT=N")


def _batch_flags(run: Run, resolved: Resolved, nodes: Nodes, environ: Mapping[str, str]) -> list[str]:
    """Rows a GPU from GPU_MEMORY and the accumulation that keeps EFFECTIVE_BATCH, unless the user gave them."""
    rows_by_memory = _ROWS_PER_GPU.get(run.name)
    if rows_by_memory is None:
        return []
    memory = _number(environ, "GPU_MEMORY", min(rows_by_memory), least=1)
    fitting = [rows for gigabytes, rows in rows_by_memory.items() if gigabytes <= memory]
    if not fitting:
        raise ConfigError(
            f"GPU_MEMORY={memory}: known are {', '.join(map(str, rows_by_memory))} (GB); for less set --batch_size and "
            f"--gradient_accumulation_steps"
        )
    by_hand = resolved.origins["batch_size"] == "flag"
    rows = resolved[TrainConfig].batch_size if by_hand else fitting[-1]
    flags = [] if by_hand else ["--batch_size", str(rows)]
    if resolved.origins["gradient_accumulation_steps"] != "flag":
        flags += ["--gradient_accumulation_steps", str(max(1, round(EFFECTIVE_BATCH / (rows * nodes.world_size))))]
    return flags


def _summary(run: Run, resolved: Resolved, nodes: Nodes) -> list[str]:
    data, training = resolved[DataConfig], resolved[TrainConfig]
    rows = training.batch_size * nodes.world_size * training.gradient_accumulation_steps
    ranks = f"{nodes.num_gpus.value} ({nodes.num_gpus.reason})"
    where = (
        f" on each of {nodes.num_nodes} nodes, this is {nodes.node_rank} of them; {nodes.address}"
        if nodes.num_nodes > 1
        else ""
    )
    accumulation = f"{training.batch_size} x {nodes.world_size} ranks x {training.gradient_accumulation_steps}"
    table = {
        "config": run.config,
        "ranks": f"{ranks}{where}, port {nodes.port}" if nodes.world_size > 1 else ranks,
        "model": training.pretrained_model or training.model_config or training.model_size,
        "data": ", ".join(training.prepared) or f"{', '.join(map(str, data.dataset))} -> {data.cache_dir}",
        "rows": "as prepared"
        if training.prepared
        else f"seq_len {data.seq_len}, packing {data.packing}, tokenizer {data.tokenizer_path}",
        "step": f"{accumulation} = {rows} rows, {rows * data.seq_len:,} tokens",
        "output": training.output_dir,
        "afterwards": run.then,
    }
    if training.resume_from_checkpoint:
        table["resume from"] = training.resume_from_checkpoint
    return [f"moai pretraining: {run.name}", *(f"  {name:<12}{value}" for name, value in table.items())]


if __name__ == "__main__":
    stop_at_once()
    sys.exit(main(sys.argv[1:]))
