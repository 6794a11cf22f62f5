"""FSDP2 on real ranks, its checkpoints and its model; and the shipped accelerate configurations, read as accelerate
reads them.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from damages import without_digests
from tiny_training import losses

from moai.core.errors import ConfigError
from moai.training import launch
from moai.training.checkpoints import problem, weights_problem
from moai.training.record import RECORD, Record
from moai.training.sharding import check_launch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
FLAGS = [
    "--batch_size",
    "2",
    "--max_steps",
    "6",
    "--learning_rate",
    "1e-2",
    "--warmup_steps",
    "0",
    "--logging_steps",
    "1",
    "--save_steps",
    "3",
    "--dataloader_num_workers",
    "0",
]
PLAIN = ["--multi_gpu"]
FSDP2 = ["--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    tiny_run.write_prepared(folder / "prepared", folder / "tokenizer")
    return folder


def run(place, output, how, *more, ranks=2, accumulation=2, code=0, before=()):
    command = [
        *before,
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *how,
        "--num_processes",
        ranks,
        "--main_process_port",
        launch.free_port(),
        ROOT / "tests/sharded_run.py",
        place / "prepared",
        place / "tokenizer",
        "--model_config",
        place / "model.json",
        "--output_dir",
        output,
        *FLAGS,
        "--gradient_accumulation_steps",
        accumulation,
        *more,
    ]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sharded(place):
    """A run, and in the same ranks another that goes on from its third step."""
    text = run(
        place,
        place / "sharded",
        FSDP2,
        "--then",
        "--resume_from_checkpoint",
        place / "sharded/checkpoint-3",
        "--output_dir",
        place / "resumed",
    )
    assert text.count("step 6/6") >= 2
    return place / "sharded"


def test_fsdp2_leaves_whole_checkpoints_and_one_model(sharded):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    for step in (3, 6):
        checkpoint = sharded / f"checkpoint-{step}"
        assert problem(checkpoint, read=True) is None
        files = {path.name for path in checkpoint.iterdir()}
        assert {"optimizer.bin", "pytorch_model_fsdp.bin", "model.safetensors", "rng_state_1.pth"} <= files
        assert {*Record.load(checkpoint).files, RECORD} == files, "whichever rank wrote it"
    assert "lm_head.weight" not in load_file(sharded / "final_model/model.safetensors"), "tied weights are one tensor"
    model, loading = AutoModelForCausalLM.from_pretrained(sharded / "final_model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == json.loads((sharded / "summary.json").read_text())["parameters"]
    )
    assert "(Qwen3ForCausalLM," in (sharded / "final_model/README.md").read_text()


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model_fsdp.bin"])
def test_a_checkpoint_of_fsdp_needs_its_own_files(sharded, tmp_path, name):
    checkpoint = shutil.copytree(sharded / "checkpoint-3", tmp_path / "checkpoint-3")
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: len(data) // 2])
    assert name in str(problem(checkpoint))
    (checkpoint / name).unlink()
    assert name in str(problem(checkpoint))


def test_fsdp2_goes_on_where_it_was(place, sharded):
    assert losses(place / "resumed") == pytest.approx(losses(sharded), abs=1e-5)
    assert len(losses(sharded)) == 6
    assert sorted(path.name for path in (place / "resumed").glob("checkpoint-*")) == ["checkpoint-6"]


def test_a_disk_without_room_for_a_checkpoint_is_said_at_once(place, sharded, tmp_path):
    """A small real one. While it wrote, rank 0 alone would fail, with the other waiting for it in a gather."""
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=400k tmpfs "$0" && exec "$@"', tmp_path]
    if subprocess.run([*small, "true"], check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    written = sum(path.stat().st_size for path in (sharded / "checkpoint-3").iterdir())
    text = run(place, tmp_path, FSDP2, before=small, code=1)
    needed, free = map(
        float,
        re.findall(
            rf"{tmp_path}/checkpoint-3: it takes (\S+) GB, and (\S+) GB are free, so it is not complete; free space",
            text,
        )[0],
    )
    assert 0.7 * written < needed * 1e9 < written
    assert free < 0.0004


@pytest.mark.long
def test_fsdp2_computes_what_plain_ranks_compute(place, sharded, tmp_path):
    run(place, tmp_path / "plain", PLAIN)
    assert losses(tmp_path / "plain") == pytest.approx(losses(sharded), abs=1e-5)
    text = run(
        place, tmp_path / "plain", FSDP2, "--resume_from_checkpoint", str(tmp_path / "plain/checkpoint-3"), code=2
    )
    assert "its optimizer was saved by plain data parallelism, this run is one of FSDP" in text


@pytest.mark.long
def test_another_number_of_ranks_goes_on_with_the_parts_of_two(place, sharded, tmp_path):
    shutil.copytree(sharded / "checkpoint-3", tmp_path / "checkpoint-3")
    run(place, tmp_path, FSDP2, "--resume_from_checkpoint", "auto", "--gradient_accumulation_steps", "1", ranks=4)
    assert losses(tmp_path) == pytest.approx(losses(sharded), abs=1e-5)


# -- the shipped configurations


def plugin_of(path, monkeypatch):
    """What a rank makes of the environment that accelerate's launcher makes of the file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if defaults.distributed_type == "DEEPSPEED":
        return defaults, None
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    return defaults, FullyShardedDataParallelPlugin() if arguments.use_fsdp else None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path, monkeypatch):
    assert len(CONFIGS) == 5
    defaults, plugin = plugin_of(path, monkeypatch)
    assert defaults.mixed_precision == "no", "train.py's --bf16 decides"
    if defaults.distributed_type == "FSDP":
        assert plugin.fsdp_version == 2
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
        assert plugin.reshard_after_forward
        assert not plugin.cpu_ram_efficient_loading
        assert not plugin.activation_checkpointing
    elif defaults.distributed_type == "DEEPSPEED":  # its package is what makes a plugin of these
        from dataclasses import fields

        from accelerate.utils import DeepSpeedPlugin

        known = {field.name for field in fields(DeepSpeedPlugin)} | {
            "deepspeed_multinode_launcher",
            "offload_optimizer_device",
            "zero3_save_16bit_model",
        }
        assert set(defaults.deepspeed_config) <= known
        assert defaults.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert defaults.deepspeed_config["zero3_init_flag"] is False


def test_what_cannot_be_driven_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr("moai.training.sharding.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        check_launch({"ACCELERATE_USE_DEEPSPEED": "true"}, on_cpu=False, rank=0)
    check_launch({"ACCELERATE_USE_FSDP": "true"}, on_cpu=False, rank=0)
    assert not caplog.text
    check_launch({"ACCELERATE_USE_FSDP": "true"}, on_cpu=True, rank=0)
    assert "here each rank holds all of it" in caplog.text


def test_a_deepspeed_checkpoint_needs_the_part_of_every_rank(sharded, tmp_path):
    """Its layout as DeepSpeed documents it, made by hand: the package is not here."""
    checkpoint = shutil.copytree(sharded / "checkpoint-3", tmp_path / "checkpoint-3")
    without_digests(checkpoint)
    (checkpoint / "global_step3").mkdir()
    (checkpoint / "latest").write_text("global_step3")
    for rank, prefix in enumerate(("", "bf16_")):
        assert f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt is missing" in str(problem(checkpoint))
        shutil.move(
            checkpoint / ("optimizer.bin", "pytorch_model_fsdp.bin")[rank],
            checkpoint / f"global_step3/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    assert problem(checkpoint) is None
    assert weights_problem(checkpoint) is None


def test_the_wrapper_launches_with_a_named_configuration(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = "configs/accelerate/fsdp2.yaml"
    words = launch.plan(
        ["pretrain", "demo", "--output_dir", str(tmp_path)], {"ACCELERATE_CONFIG": config, "NUM_GPUS": "4"}
    )
    assert f"accelerate launch --config_file {config} " in words
    assert "--multi_gpu" not in words
    assert "--num_processes 4" in words
    assert "accelerate" in launch.plan(
        ["pretrain", "demo", "--output_dir", str(tmp_path)], {"ACCELERATE_CONFIG": config, "NUM_GPUS": "1"}
    )
    for wrong, message in (
        ("nowhere.yaml", "No such file"),
        ("configs/demo.yaml", "none of MULTI_GPU, FSDP, DEEPSPEED"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch.plan(["pretrain", "demo", "--output_dir", str(tmp_path)], {"ACCELERATE_CONFIG": wrong})
