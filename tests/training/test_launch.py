"""The shipped configurations, and how many ranks, rows and nodes the wrappers start."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moai.core.config import resolve
from moai.core.errors import ConfigError
from moai.pretraining.options import DataConfig
from moai.training import launch
from moai.training.arguments import TrainConfig
from moai.training.report import Summary, save_settings

REPO = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path for path in (REPO / "configs").glob("*.yaml") if not path.name.startswith("entity_coref")
)  # of train.py
MODELS = sorted((REPO / "configs").glob("model_config_*.json"))


@pytest.fixture(autouse=True)
def in_a_fresh_project(monkeypatch: pytest.MonkeyPatch, project: Path) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configuration_is_complete_and_names_known_fields(path: Path) -> None:
    resolved = resolve(
        [DataConfig, TrainConfig], ["--config", str(path)], {}, prog="train.py"
    )  # an unknown name raises
    data, training = resolved[DataConfig].require(), resolved[TrainConfig].require()
    assert set(yaml.safe_load(path.read_text())) <= {
        name for name, origin in resolved.origins.items() if origin != "default"
    }
    assert (training.mode, data.packing) == (
        ("sft", "bfd") if path.stem.startswith("sft") else ("pretrain", "bfd_split")
    )
    assert data.cache_dir != training.output_dir
    if training.model_config:
        model = json.loads(Path(training.model_config).read_text())
        assert model["max_position_embeddings"] >= data.seq_len


def test_an_unknown_name_in_a_configuration_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((REPO / "configs/demo.yaml").read_text() + "learning_rat: 1\n")
    with pytest.raises(ConfigError, match="unknown name 'learning_rat'; did you mean learning_rate"):
        resolve([DataConfig, TrainConfig], ["--config", str(wrong)], {}, prog="train.py")


def test_every_model_has_the_same_fields() -> None:
    fields = {path.name: set(json.loads(path.read_text())) for path in MODELS}
    assert len(fields) == 3
    assert len({frozenset(names) for names in fields.values()}) == 1
    assert {"rope_scaling", "use_qk_norm", "mlp_bias", "pad_token_id"} <= fields["model_config_2b.json"]


@pytest.mark.parametrize(
    ("size", "total", "without_embeddings"), [("demo", 5.05e6, 2.95e6), ("2b", 2.85e9, 2.13e9), ("5b", 5.25e9, 4.27e9)]
)
def test_parameters_are_what_the_names_and_comments_say(size: str, total: float, without_embeddings: float) -> None:
    model = json.loads((REPO / f"configs/model_config_{size}.json").read_text())
    hidden, heads, kv_heads = model["hidden_size"], model["num_attention_heads"], model["num_key_value_heads"]
    head = hidden // heads
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head + 2 * head  # q and o, k and v, the norms of q and k
    layer = attention + 3 * hidden * model["intermediate_size"] + 2 * hidden
    rest = model["num_hidden_layers"] * layer + hidden
    embeddings = model["vocab_size"] * hidden * (1 if model["tie_word_embeddings"] else 2)
    assert rest == pytest.approx(without_embeddings, rel=0.005)
    assert rest + embeddings == pytest.approx(total, rel=0.005)


def test_demo_model_fits_the_shipped_tokenizer() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(REPO / "tokenizers/demo/tokenizer.json"))
    named = json.loads((REPO / "tokenizers/demo/tokenizer_config.json").read_text())
    model = json.loads((REPO / "configs/model_config_demo.json").read_text())
    assert model["vocab_size"] == tokenizer.get_vocab_size()
    assert [model[f"{role}_token_id"] for role in ("pad", "bos", "eos")] == [
        tokenizer.token_to_id(named[f"{role}_token"]) for role in ("pad", "bos", "eos")
    ]


def planned(command: str, *words: str, **environ: str) -> tuple[int, list[str], list[str]]:
    """NUM_GPUS, the launcher's words and train.py's flags, as the shell reads them."""
    shell = (
        launch.plan([command, *words], {"CUDA_VISIBLE_DEVICES": "", **environ})
        + '\nprintf "%s\\0" "$NUM_GPUS" "${#launcher[@]}" "${launcher[@]}" "${flags[@]}"'
    )
    num_gpus, size, *rest = subprocess.run(
        ["bash", "-uc", shell], check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    return int(num_gpus), rest[: int(size)], rest[int(size) :]


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_flags_reach_train_py_word_by_word() -> None:
    odd = ["--text_template", "{a}\n$(b) 'c' \"d\" \\", "--dataset", "a b", "*"]
    _, _, flags = planned("pretrain", "demo", *odd)
    assert flags[-len(odd) :] == odd


def test_the_users_flags_come_last_and_variables_before_them() -> None:
    _, _, flags = planned("pretrain", "--output_dir", "mine", OUTPUT_DIR="theirs", CACHE_DIR="cache")
    assert flags[flags.index("--output_dir") :] == [
        "--output_dir",
        "theirs",
        "--cache_dir",
        "cache",
        "--use_cpu",
        "true",
        "--output_dir",
        "mine",
    ]


def test_an_unfinished_run_is_offered_to_be_resumed_with_the_command(in_a_fresh_project: Path) -> None:
    (in_a_fresh_project / "outputs/demo/checkpoint-5").mkdir(parents=True)
    with pytest.raises(ConfigError) as refused:
        planned("pretrain", "demo", "--seed", "5", MAX_STEPS="7")
    assert str(refused.value) == (
        "outputs/demo: holds a run already, which is not finished (newest: checkpoint-5); "
        "go on with it: ./pretrain_cont.sh demo --resume --max_steps 7 --seed 5; "
        "begin this one elsewhere: OUTPUT_DIR=outputs/demo_again ./pretrain.sh demo --max_steps 7 --seed 5"
    )
    offered = planned("continue", "demo", "--resume", "--max_steps", "7", "--seed", "5")[2]
    assert [value(offered, name) for name in ("--resume_from_checkpoint", "--max_steps", "--seed")] == [
        "auto",
        "7",
        "5",
    ]
    assert value(planned("pretrain", "--output_dir", "mine")[2], "--output_dir") == "mine"


@pytest.fixture
def trained(in_a_fresh_project: Path) -> Path:
    """What `MAX_STEPS=7 ./pretrain.sh` leaves of itself, as far as it is looked at."""
    run = in_a_fresh_project / "outputs/demo"
    flags = ["--config", "configs/demo.yaml", "--max_steps", "7", "--use_cpu", "true"]
    (run / "checkpoint-7").mkdir(parents=True)
    (run / "final_model").mkdir()
    (run / "final_model/config.json").write_text("{}")
    (run / "final_model/model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    save_settings(run, resolve([DataConfig, TrainConfig], flags, {}, prog="train.py").table())
    figures = {field.name: 0 for field in dataclasses.fields(Summary)}
    Summary(**{**figures, "steps": 7, "output_dir": "outputs/demo", "final_model": "outputs/demo/final_model"}).save()
    return run


@pytest.mark.parametrize("words", [("pretrain",), ("pretrain", "demo"), ("continue", "demo", "--resume")])
def test_a_finished_run_is_no_error_and_starts_nothing(
    trained: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.plan(words, {"CUDA_VISIBLE_DEVICES": "", "MAX_STEPS": "7", "DATASET_NUM_PROC": "3"}) == "exit 0"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "moai pretraining: demo is trained already, so nothing was started"
    assert "Final model   outputs/demo/final_model" in said
    assert said[-3:] == [
        "Next data     ./pretrain_cont.sh demo",
        "More steps    ./pretrain_cont.sh demo --resume --max_steps 7 --max_steps 14",
        "Once more     OUTPUT_DIR=outputs/demo_again ./pretrain.sh demo --max_steps 7",
    ]


def test_next_data_of_another_place_names_its_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained.rename(trained.with_name("mine"))
    assert (
        launch.plan(["pretrain", "--max_steps", "7", "--output_dir", "outputs/mine"], {"CUDA_VISIBLE_DEVICES": ""})
        == "exit 0"
    )
    said = capsys.readouterr().err
    assert "Next data     ./pretrain_cont.sh demo --pretrained_model outputs/mine/final_model" in said
    assert (
        "Once more     ./pretrain.sh demo --max_steps 7 --output_dir outputs/mine --output_dir outputs/mine_again"
        in said
    )


def test_what_was_trained_otherwise_or_went_on_is_not_taken_for_finished(trained: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"trained with other settings \(learning_rate 0.001 there, 0.5 here; max_steps 7 there, 120 here\)",
    ):
        planned("pretrain", "--learning_rate", "0.5")
    assert value(planned("continue", "--resume", "--max_steps", "14")[2], "--resume_from_checkpoint") == "auto"
    (trained / "checkpoint-9").mkdir()
    with pytest.raises(ConfigError, match=r"not finished \(newest: checkpoint-9\)"):
        planned("pretrain", MAX_STEPS="7")
    (trained / "checkpoint-9").rmdir()
    (trained / "final_model/model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"not finished \(newest: checkpoint-7\)"):
        planned("pretrain", MAX_STEPS="7")


def test_train_py_has_nothing_to_do_where_the_resumed_run_has_ended(trained: Path) -> None:
    """Before torch is imported, and in both ranks."""
    words = ["--config", "configs/demo.yaml", "--max_steps", "7", "--resume_from_checkpoint", "auto"]
    code = (
        "import sys, train; code = train.main(sys.argv[1:], __import__('os').environ); sys.exit(code or 3 * "
        "('torch' in sys.modules))"
    )
    said = []
    for rank in ("0", "1"):
        environ = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        done = subprocess.run([sys.executable, "-c", code, *words], env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert said == [
        "Nothing to do: trained 7 steps, final model at outputs/demo/final_model (its data was not looked at again)\n",
        "",
    ]


def test_one_rank_needs_no_launcher() -> None:
    assert planned("pretrain", NUM_GPUS="1")[:2] == (1, [".venv/bin/python"])


def test_num_gpus_is_ranks_and_leaves_the_device_to_train_py() -> None:
    ranks, launcher, flags = planned("pretrain", NUM_GPUS="4")
    assert (ranks, value(launcher, "--num_processes")) == (4, "4")
    assert "--use_cpu" not in flags


def test_several_nodes_share_one_rendezvous() -> None:
    ranks, launcher, _ = planned("pretrain", NUM_GPUS="8", NNODES="3", NODE_RANK="2", MASTER_ADDR="node0")
    assert ranks == 8
    names = ("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port")
    assert [value(launcher, name) for name in names] == ["24", "3", "2", "node0", "29500"]
    assert value(planned("pretrain", NUM_GPUS="2", MASTER_PORT="4242")[1], "--main_process_port") == "4242"


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch.free_port(port) > port


@pytest.mark.parametrize(
    ("words", "environ", "rows", "accumulation"),
    [
        (("2b",), {"NUM_GPUS": "4"}, 4, 24),  # 384 = 4 x 4 x 24
        (("2b",), {"NUM_GPUS": "4", "GPU_MEMORY": "48"}, 12, 8),
        (("2b",), {"NUM_GPUS": "4", "GPU_MEMORY": "80"}, 24, 4),
        (("2b",), {"NUM_GPUS": "4", "GPU_MEMORY": "96"}, 24, 4),
        (("2b",), {"NUM_GPUS": "8", "NNODES": "2", "MASTER_ADDR": "a", "GPU_MEMORY": "80"}, 24, 1),
        (("5b",), {"NUM_GPUS": "4"}, 1, 96),
        (("2b", "--batch_size", "6"), {"NUM_GPUS": "4"}, 6, 16),
        (("2b", "--gradient-accumulation-steps", "3"), {"NUM_GPUS": "4"}, 4, 3),
        (("demo",), {"NUM_GPUS": "4"}, 8, 1),  # the table is for the large models
    ],
)
def test_rows_a_gpu_and_accumulation_keep_384_rows_a_step(
    words: tuple[str, ...], environ: dict[str, str], rows: int, accumulation: int
) -> None:
    _, _, flags = planned("pretrain", *words, **environ)
    training = resolve([DataConfig, TrainConfig], flags, {}, prog="train.py")[TrainConfig]
    assert (training.batch_size, training.gradient_accumulation_steps) == (rows, accumulation)


def test_continuing_a_configuration_without_next_data_asks_for_it(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((REPO / "configs/demo.yaml").read_text().replace("outputs/demo", str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="no trained model"):
        planned("continue", str(own))
    (tmp_path / "run/final_model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="needs the next data"):
        planned("continue", str(own))
    _, _, flags = planned("continue", str(own), "--dataset", "data/demo_next")
    training = resolve([DataConfig, TrainConfig], flags, {}, prog="train.py")[TrainConfig]
    assert (training.pretrained_model, training.output_dir) == (
        str(tmp_path / "run/final_model"),
        str(tmp_path / "run_cont"),
    )
    _, _, flags = planned("continue", str(own), "--pretrained_model", "some/model", "--dataset", "data/demo_next")
    assert shlex.join(flags).endswith("--pretrained_model some/model --dataset data/demo_next")
