"""The methods of transformers' Trainer that moai overrides, private ones too: one that another release renames would
never be called again, and nothing would say so. The releases this holds for are those that pyproject.toml allows.
"""

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

from moai.training.loop import PackedTrainer

OWN = {"_check_room", "_gathered"}
OVERRIDDEN = {
    "_get_train_sampler": "train_dataset",
    "get_train_dataloader": "",
    "get_batch_samples": "epoch_iterator num_batches device",
    "training_step": "model inputs num_items_in_batch",
    "log": "logs start_time",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save_checkpoint": "model trial",
    "save_model": "output_dir _internal_call",
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_issue_warnings_after_load": "load_result",
}


def test_every_method_that_is_overridden_is_there_with_the_parameters_it_is_given():
    from transformers import Trainer

    ours = {name for name, value in vars(PackedTrainer).items() if inspect.isfunction(value) and name != "__init__"}
    assert ours - OWN == OVERRIDDEN.keys()
    theirs = {name: " ".join([*inspect.signature(getattr(Trainer, name)).parameters][1:]) for name in OVERRIDDEN}
    assert theirs == OVERRIDDEN
    assert not [name for name in OWN if hasattr(Trainer, name)], "moai's own, by a name that transformers has taken"


def test_what_fills_in_chat_templates_is_there_with_its_parameters():
    """Private too: moai.transforms.template."""
    from transformers.utils import chat_template_utils

    for name, wanted in {
        "_compile_jinja_template": "chat_template",
        "_plain_template_data": "value",
        "_alias_reasoning_fields": "chat",
        "_render_with_assistant_indices": "compiled_template messages tools documents add_generation_prompt "
        "template_kwargs",
    }.items():
        assert " ".join(inspect.signature(getattr(chat_template_utils, name)).parameters) == wanted, name


def test_only_the_releases_that_this_was_tried_with_are_allowed():
    minor = version("transformers").rpartition(".")[0]
    major, number = minor.split(".")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={minor},<{major}.{int(number) + 1}" in project["dependencies"]
