"""Training end to end on tiny models: real launchers, real process groups, real checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from moai.core.config import resolve
from moai.core.errors import ConfigError, DamagedError, MoaiError, TokenizerError
from moai.prepared.rows import PackedRows
from moai.pretraining.options import DataConfig
from moai.training.arguments import TrainConfig
from moai.training.data import PackedCollator
from moai.training.model import build_model, check_early, check_fit, count_parameters, load_config
from moai.training.order import Order, sources_of

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parents[1] / "tiny_run.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORDS = (
    "--batch_size 2 --gradient_accumulation_steps 2 --num_epochs 3 --learning_rate 1e-2 --warmup_steps 0 "
    "--logging_steps 2 --save_steps 4"
)
FLAGS = WORDS.split()


def run(command: list[Any], *, code: int | None = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DATASET_", "MOAI_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def settings(argv: list[str]) -> TrainConfig:
    return resolve([TrainConfig, DataConfig], argv, {}, prog="train.py")[TrainConfig]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a model configuration and two prepared directories: 26 rows are 3 steps of 8 rows an epoch."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    tiny_run.write_prepared(folder / "prepared", folder / "tokenizer")
    tiny_run.write_prepared(folder / "other", folder / "tokenizer", seed=1, rows=25)
    return folder


def driver(place: Path, output: Path, *more: str, prepared: str = "prepared") -> list[Any]:
    folders = ",".join(str(place / name) for name in prepared.split(","))
    places = [place / "tokenizer", "--model_config", place / "model.json", "--output_dir", output]
    return [DRIVER, folders, *places, *FLAGS, *more]


@pytest.fixture(scope="module")
def first_run(place: Path) -> Path:
    """Two gloo ranks, three epochs, never interrupted."""
    done = run([*TORCHRUN, *driver(place, place / "first")])
    (place / "first.out").write_text(done.stdout)
    (place / "first.err").write_text(done.stderr)
    return place / "first"


# -- settings


def test_nonsense_is_refused_in_one_line() -> None:
    for flags, message in (
        ("--mode rl", "choose from pretrain, sft"),
        ("--mixture_temperature 0", "must be above 0"),
        ("--batch_size 0", "batch_size = 0: must be at least 1"),
        ("--learning_rate 0", "must be above 0"),
        ("--learning_rate nan", "must be above 0"),
        ("--max_steps 0", "at least 1, or -1"),
        ("--num_epochs -1", "must be above 0"),
        ("--warmup_steps 2.5", "a whole number of steps, or a share below 1"),
        ("--warmup_steps -1", "at least 0"),
        ("--bf16 --fp16", "choose one"),
        ("--fp16 --use_cpu", "needs a GPU"),
        ("--lr_scheduler_type step", "choose from cosine"),
        ("--save_total_limit 0", "at least 1"),
        ("--gradient_accumulation_steps 1.5", "whole number"),
        ("--seed -1", "at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(flags.split())


def test_precedence_and_spellings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1.0e-3\nper_device_train_batch_size: 8\nwarmup_steps: 0.1\nmax_seq_length: 128\n"
    )
    argv = ["--config", str(tmp_path / "run.yaml"), "--learning-rate", "2e-3", "--resume_from_checkpoint"]
    resolved = resolve([TrainConfig, DataConfig], argv, {"DATASET_NUM_PROC": "3"}, prog="train.py")
    config = resolved[TrainConfig]
    assert (
        config.learning_rate,
        config.batch_size,
        config.warmup_steps,
        config.resume_from_checkpoint,
        config.seed,
    ) == (2e-3, 8, 0.1, "auto", 42)
    assert (resolved[DataConfig].seq_len, resolved[DataConfig].num_proc) == (128, 3)
    names = ("learning_rate", "batch_size", "resume_from_checkpoint", "seed", "num_proc")
    assert [resolved.origins[name].split()[0] for name in names] == ["flag", "file", "flag", "default", "environment"]
    assert settings(["--resume_from_checkpoint", "none"]).resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("given", "missing"), [({"model_config": "m"}, "--output_dir"), ({"output_dir": "o"}, "--model_config")]
)
def test_what_is_required_is_named(given: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        TrainConfig(**given).require()


# -- the model


def test_fields_become_qwen3(tmp_path: Path) -> None:
    path = tiny_run.write_model_config(
        tmp_path,
        rope_theta=5e5,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        initializer_range=0.01,
    )
    config = load_config(str(path), None)
    assert config.model_type == "qwen3"
    assert (config.head_dim, config.num_key_value_heads, config.hidden_act, config.initializer_range) == (
        8,
        2,
        "silu",
        0.01,
    )
    assert config.rope_parameters == {
        "rope_theta": 5e5,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = build_model(
        config, pretrained_model=None, attention="sdpa", special_ids={"eos_token_id": 3, "bos_token_id": None}, seed=1
    )
    embeddings = 300 * 32
    attention, mlp, norms = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64, 2 * 32 + 2 * 8
    assert count_parameters(model) == (
        embeddings + 2 * (attention + mlp + norms) + 32,
        2 * (attention + mlp + norms) + 32,
    )
    assert (model.config.eos_token_id, model.config.use_cache, model.dtype) == (3, False, torch.float32)


@pytest.mark.parametrize("name", ["2b", "5b", "demo"])
def test_shipped_configurations_have_the_parameters_they_say(name: str) -> None:
    from transformers import AutoModelForCausalLM

    path = ROOT / "configs" / f"model_config_{name}.json"
    with torch.device("meta"):
        total, body = count_parameters(AutoModelForCausalLM.from_config(load_config(str(path), None)))
    assert {"2b": (2.85e9, 2.13e9), "5b": (5.25e9, 4.27e9), "demo": (5.05e6, 2.95e6)}[name] == pytest.approx(
        (total, body), rel=3e-3
    )


def test_models_that_are_none_are_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"use_qk_norm": False}, "use_qk_norm false is another architecture"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"hidden_sizes": 8}, "unknown field 'hidden_sizes'; did you mean hidden_size"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"model_type": "qwen33"}, "model_type 'qwen33' is unknown"),
        ({"hidden_size": "32"}, "hidden_size = '32' is not a whole number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            load_config(str(tiny_run.write_model_config(tmp_path, **changes)), None)


def test_files_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"vocab_size": 1')
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((str(tmp_path / "cut.json"), None), "not readable as JSON"),
        ((str(tmp_path / "none.json"), None), "No such file"),
        ((None, str(tmp_path / "none")), "no such directory"),
        ((None, str(tmp_path / "empty")), "config.json is missing"),
    ]:
        with pytest.raises(MoaiError, match=message):
            load_config(*arguments)


def test_a_directory_that_is_no_model_is_refused_early_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: has no config.json, .* OUTPUT_DIR/final_model"):
        check_early(model_config=None, pretrained_model=str(tmp_path), vocab_size=None, seq_len=8)


def test_model_and_data_must_fit(tmp_path: Path) -> None:
    path = str(tiny_run.write_model_config(tmp_path))
    config = load_config(path, None)
    check_fit(config, ids=300, seq_len=64)
    check_early(model_config=path, pretrained_model=None, vocab_size=300, seq_len=64)
    for fits in (
        lambda vocabulary, length: check_fit(config, ids=vocabulary, seq_len=length),
        lambda vocabulary, length: check_early(
            model_config=path, pretrained_model=None, vocab_size=vocabulary, seq_len=length
        ),
    ):
        with pytest.raises(ConfigError, match=r"vocab_size 300 is below .*301"):
            fits(301, 64)
        with pytest.raises(ConfigError, match="seq_len 65 is above the model's max_position_embeddings 64"):
            fits(300, 65)


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # the state it starts from must not matter
        config = load_config(str(tiny_run.write_model_config(tmp_path)), None)
        return (
            build_model(config, pretrained_model=None, attention="sdpa", special_ids={}, seed=seed)
            .model.layers[1]
            .mlp.up_proj.weight
        )

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# -- whole runs


def test_two_ranks_train_and_leave_a_model(first_run: Path, place: Path) -> None:
    summary = json.loads((first_run / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"] - 1.0
    assert (summary["steps"], summary["rows"], summary["documents"], summary["quarantined"], summary["parameters"]) == (
        9,
        26,
        52,
        3,
        28_224,
    )
    assert summary["tokens_seen"] == trained_tokens(place, rows=72), (
        "9 steps of 8 rows: what is left of three epochs of 26 makes no whole step"
    )
    assert (
        f"Loss          {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} in 9 steps"
        in (place / "first.out").read_text()
    )
    assert {path.name for path in first_run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 8, 9)}
    names = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert {path.name for path in (first_run / "final_model").iterdir()} == {*names.split()}
    card = (first_run / "final_model" / "README.md").read_text()
    assert all(
        text in card
        for text in ("52 documents", "bfd_split", "28,224 parameters", summary["content_digest"], "| counting | 52 |")
    )


def trained_tokens(place: Path, *, rows: int) -> int:
    """Every token of the first `rows` of the order but the first of each document."""
    prepared = tiny_run.open_prepared(place / "prepared")
    held, order = PackedRows.of(prepared), Order(sources_of(prepared.content["shards"]), seed=42)
    return sum(
        int((PackedCollator(pad_id=0)([held[index]])["labels"] != -100).sum())
        for index in order.rows_at(np.arange(rows))
    )


def test_the_final_model_is_loaded_by_transformers_and_has_learned_to_count(first_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(first_run / "final_model")
    tokenizer = AutoTokenizer.from_pretrained(first_run / "final_model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert tokenizer.decode(tokenizer("한국어 text")["input_ids"]) == "한국어 text"
    assert (
        (model.config.eos_token_id, model.config.pad_token_id)
        == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        == (256, 257)
    )
    with torch.no_grad():
        loss = model(input_ids=torch.arange(10, 22)[None], labels=torch.arange(10, 22)[None]).loss
    assert loss < np.log(300) - 1.0


def test_the_log_is_short_and_every_rank_keeps_its_own(first_run: Path, place: Path) -> None:
    console = (place / "first.err").read_text()
    steps = re.findall(
        r"step (\d+)/9  loss (\d+\.\d+)  lr \S+  norm \S+  ([\d,]+) tokens/s  wait \d+\.\d%  \d+\.\d GB  \d+:\d\d left",
        console,
    )
    assert [int(step) for step, _, _ in steps] == [1, 2, 4, 6, 8, 9]
    assert "Packed attention checked" in console
    assert "28,224 parameters" in console
    ours = [line for line in console.splitlines() if line and "torch/distributed/run.py" not in line]
    assert len(ours) < 25, console
    assert "Warning" not in console
    for rank in (0, 1):
        assert "step 9/9" in (first_run / "logs" / f"rank{rank}.log").read_text()
    history = json.loads((first_run / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["tokens_per_second"] > 0 and entry["tokens_seen"] > 0 for entry in history if "loss" in entry)


def test_a_resumed_run_ends_in_the_same_weights(first_run: Path, place: Path, tmp_path: Path) -> None:
    """From the middle of the second epoch, past a newer checkpoint that a crash left in pieces."""
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.copytree(first_run / name, tmp_path / "out" / name)
    (tmp_path / "out" / "checkpoint-8" / "optimizer.pt").unlink()
    done = run([*TORCHRUN, *driver(place, tmp_path / "out", "--resume_from_checkpoint")])
    assert "checkpoint-8 is incomplete (optimizer.pt is missing); renamed to checkpoint-8.incomplete" in done.stderr
    assert done.stderr.count("renamed to") == 1, "by rank 0 alone"
    assert "missing keys" not in done.stderr, "tied weights are not missing"
    assert [int(step) for step in re.findall(r"step (\d+)/9", done.stderr)] == [6, 8, 9]
    first, resumed = (json.loads((folder / "summary.json").read_text()) for folder in (first_run, tmp_path / "out"))
    assert resumed["resumed_from"].endswith("checkpoint-4")
    for name in ("loss_first", "loss_last", "tokens_seen", "steps"):
        assert resumed[name] == first[name], name
    weights = [(folder / "final_model" / "model.safetensors").read_bytes() for folder in (first_run, tmp_path / "out")]
    assert weights[0] == weights[1]


def test_one_rank_goes_on_with_what_two_began(first_run: Path, place: Path, tmp_path: Path) -> None:
    """The same rows a step, divided otherwise: the same order, and sums that differ by rounding only."""
    shutil.copytree(first_run / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    more = ["--resume_from_checkpoint", "auto", "--gradient_accumulation_steps", "4"]
    train_here(place, driver(place, tmp_path / "out", *more))
    first, resumed = (json.loads((folder / "summary.json").read_text()) for folder in (first_run, tmp_path / "out"))
    assert resumed["tokens_seen"] == first["tokens_seen"]
    assert resumed["loss_last"] == pytest.approx(first["loss_last"], rel=1e-4)


def train_here(place: Path, command: list[Any], *, tokenizer: Path | None = None) -> Any:
    from moai.training.stages import Stage
    from moai.training.trainer import train

    resolved = resolve(
        [TrainConfig, DataConfig],
        [*map(str, command[3:]), "--tokenizer_path", str(tokenizer or place / "tokenizer")],
        {},
        prog="test",
    )
    stage = Stage(resolved[TrainConfig], resolved[DataConfig], tiny_run.open_prepared(place / "prepared"))
    return train(resolved[TrainConfig], [stage], resolved.origins, environ={})[0]


def test_continued_pretraining_takes_weights_and_nothing_else(first_run: Path, place: Path, tmp_path: Path) -> None:
    command = driver(place, tmp_path / "out", "--pretrained_model", str(first_run / "final_model"), "--max_steps", "1")
    summary = train_here(place, command)
    first = json.loads((first_run / "summary.json").read_text())
    assert summary.loss_first < first["loss_first"] - 1.0, "the weights came"
    assert (summary.steps, summary.resumed_from) == (1, None)
    assert summary.tokens_seen < first["tokens_seen"] / 8


def test_a_loss_that_is_no_number_ends_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match=r"the loss is nan at step [23]: lower --learning_rate"):
        train_here(place, driver(place, tmp_path / "out", "--learning_rate", "1e30", "--logging_steps", "1"))


def test_a_damaged_shard_is_one_line_from_a_process_that_reads_too(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "prepared", tmp_path / "prepared")
    shutil.copyfile(
        tmp_path / "prepared" / "data-00000-of-00003.arrow", tmp_path / "prepared" / "data-00002-of-00003.arrow"
    )
    for processes in ("0", "1"):
        with pytest.raises(DamagedError) as caught:
            train_here(
                tmp_path,
                driver(place, tmp_path / f"out{processes}", "--dataloader_num_workers", processes),
                tokenizer=place / "tokenizer",
            )
        assert re.fullmatch(
            rf"{tmp_path}/prepared/data-00002-of-00003.arrow: 9 rows, the manifest says 8; remove {tmp_path}/prepared "
            rf".*",
            str(caught.value),
        )


def test_too_few_rows_for_one_step_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"the run has 78 rows, one step takes 128 \(batch_size 64 x gradient_accumulation_steps 2 x 1 ranks\)",
    ):
        train_here(place, driver(place, tmp_path / "out", "--batch_size", "64"))


def test_another_tokenizer_than_the_datas_is_refused(place: Path, tmp_path: Path) -> None:
    other = tiny_run.write_tokenizer(tmp_path / "tokenizer")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(TokenizerError, match="the data was made with"):
        train_here(place, driver(place, tmp_path / "out"), tokenizer=other)


def test_ranks_with_other_data_end_with_the_list(place: Path, tmp_path: Path) -> None:
    """Both, each with its own exit: no agent stops the second for the first."""
    command = [sys.executable, *driver(place, tmp_path / "out", prepared="prepared,other")]
    results = launch_plainly(command)
    for code, error in results:
        assert code == 1
        assert re.search(
            r"tiny_run: error: the ranks do not hold the same data \(content_digest: rank 0 \w{64}, rank 1 \w{64}\)",
            error,
        ), error
        assert "Traceback" not in error


def launch_plainly(command: list[Any], **environ: str) -> list[tuple[int, str]]:
    """Two ranks without a launcher: (exit code, standard error) of each."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**os.environ, **group, **environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors)]


LATE = """
import os, sys, time
from datetime import timedelta
from moai.core.distributed import ranks
from moai.core.stopping import end
from moai.training.process_group import join_on_cpu
here = ranks(os.environ)
import torch.distributed as dist
if here.rank == 0:
    time.sleep(5)                     # the rank with the store is later than the timeout below: this is tested
join_on_cpu(here, timeout_seconds=2, environ=os.environ)
dist.barrier()
if here.rank == 1:
    try:
        dist.barrier()
    except RuntimeError as error:
        print("timed out", file=sys.stderr)
    dist.distributed_c10d._get_default_store().set("seen", "")
else:
    dist.distributed_c10d._get_default_store().wait(["seen"], timedelta(seconds=60))
end(0)
"""


def test_a_rank_may_be_later_than_ddp_timeout_until_the_group_exists() -> None:
    (code, other), (other_code, error) = launch_plainly([sys.executable, "-c", LATE])
    assert (code, other_code) == (0, 0), error + other
    assert "timed out" in error, "and then the timeout is real"


# -- train.py


@pytest.fixture(scope="module")
def texts(place: Path) -> Path:
    path = place / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " * 12}) + "\n" for n in range(200)))
    return path


def train_py(place: Path, texts: Path, output: Path, *more: Any) -> list[Any]:
    data = ["--dataset", texts, "--tokenizer_path", place / "tokenizer", "--cache_dir", place / "cache"]
    model = ["--model_config", place / "model.json", "--output_dir", output, "--max_steps", "6"]
    return [
        ROOT / "train.py",
        *data,
        *["--seq_len", "48", "--packing", "bfd", "--num_proc", "1"],
        *model,
        *FLAGS,
        *more,
    ]


def test_accelerate_launch_then_plain_python_resumes(place: Path, texts: Path, tmp_path: Path) -> None:
    flags = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags.split()]
    done = run([*launch, *train_py(place, texts, tmp_path / "out")])
    assert "cpu x 2 ranks" in done.stderr
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (saved["packing"], saved["seed"]) == ({"value": "bfd", "origin": "flag"}, {"value": 42, "origin": "default"})
    assert done.stderr.count("learning_rate ") == 1, "the settings are printed once"

    more = "--gradient_accumulation_steps 4 --resume_from_checkpoint --max_steps 8"
    again = run([sys.executable, *train_py(place, texts, tmp_path / "out", *more.split())])
    assert "cpu x 1 ranks" in again.stderr
    assert "Resuming from" in again.stderr
    assert re.findall(r"step (\d+)/8", again.stderr) == ["8"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--no_such_flag"], 2, "unrecognized arguments: --no_such_flag"),
        (["--data_format", "chat"], 2, "conversations are for --mode sft"),
        (["--output_dir", ""], 2, "set --output_dir"),
        (["--model_config", "none.json"], 2, "none.json: No such file"),
        (["--seq_len", "65"], 2, "above the model's max_position_embeddings 64"),
        (["--resume_from_checkpoint"], 2, "has no checkpoint"),
        (["--output_dir", "README.md/x"], 2, "output_dir README.md/x"),
        (["--dataset", "none.jsonl"], 66, "none.jsonl"),
    ],
)
def test_mistakes_are_one_line_with_a_code(
    place: Path, texts: Path, tmp_path: Path, run_moai: Callable[..., Any], more: list[str], code: int, message: str
) -> None:
    if more[-1].startswith("README.md"):
        more = ["--output_dir", str(tmp_path / "file" / "x")]
        (tmp_path / "file").write_text("")
        message = re.escape(f"--output_dir {tmp_path / 'file' / 'x'}: Not a directory")
    done = run_moai("train", *train_py(place, texts, tmp_path / "out", *more)[1:])
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert (done.returncode, len(errors)) == (code, 1), done.stderr
    assert re.search(f"moai train: error: .*{message}", errors[0])


def test_ctrl_c_ends_with_one_line(place: Path, texts: Path, tmp_path: Path) -> None:
    more = ("--max_steps", "1000000", "--logging_steps", "1")
    command = [sys.executable, *train_py(place, texts, tmp_path / "out", *more)]
    with subprocess.Popen([str(word) for word in command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "step 1/" in line), None)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert said is not None, rest
    assert process.returncode == 130
    assert "train.py: interrupted" in rest
    assert "Traceback" not in rest


def test_torchrun_names_the_cause(place: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    done = run([*TORCHRUN, *train_py(place, texts, tmp_path / "out")], code=1)
    assert "train.py: error: --output_dir" in done.stderr
    root_cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"traceback : --output_dir .* holds a run already", root_cause)
    assert "<N/A>" not in root_cause


def test_train_py_imports_nothing_heavy_before_the_data_is_ready() -> None:
    """Worker processes import it again, and a waiting rank holds its memory for hours."""
    code = (
        "import sys, train, moai.training.arguments, moai.training.checkpoints, moai.training.model, "
        "moai.training.logs; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in "
        "sys.modules])"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "[]"


def test_a_tracker_that_is_not_there_is_refused_before_any_data_is_read(
    train_py: Callable[..., str], tmp_path: Path
) -> None:
    words = ["--config", "configs/demo.yaml", "--output_dir", str(tmp_path / "run"), "--report_to"]
    for name, said in (
        ("wandb", "report_to = wandb: not installed .*tensorboard.*pip install wandb"),
        ("wandbb", "no such tracker; did you mean wandb?"),
    ):
        with pytest.raises(ConfigError, match=said):
            train_py(*words, name)
    assert not list(tmp_path.iterdir())
