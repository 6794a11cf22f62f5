"""The same few steps computed in other ways: recomputed activations, bfloat16, compiled, eager attention. The losses
must be those of the plain run.
"""

import math

import numpy as np
import pytest
from tiny_training import losses, train_here

from moai.prepared.rows import PackedRows, Row

STEPS = ("--max_steps", "5", "--learning_rate", "1e-2", "--dataloader_num_workers", "0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(train_here(tmp_path_factory.mktemp("plain"), *STEPS))


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--gradient_checkpointing"], 1e-6),
        (["--attention", "eager"], 1e-5),
        (["--bf16"], 2e-2),
        (["--bf16", "--gradient_checkpointing"], 2e-2),
        pytest.param(["--compile"], 1e-4, marks=[pytest.mark.long, pytest.mark.filterwarnings("default")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_losses_are_those_of_the_plain_run(flags, tolerance, plain, tmp_path):
    found = losses(train_here(tmp_path, *STEPS, *flags))
    assert len(found) == 5
    assert plain[0] - plain[-1] > 0.5, "the steps move the weights"
    assert found == pytest.approx(plain, abs=tolerance)
    if "--bf16" in flags:
        assert found != plain, "another number format rounds elsewhere"


def test_a_step_without_a_target_leaves_the_weights_numbers(tmp_path, monkeypatch):
    """Where one row is a step, and it is one token: nothing could predict it, and a mean over nothing would be the end
    of the model.
    """
    whole, seen = PackedRows.__getitem__, []

    def second_is_a_token(rows, index):
        seen.append(index)
        row = whole(rows, index)
        return Row(row.input_ids[:1], np.array([1], np.uint32)) if len(seen) == 2 else row

    monkeypatch.setattr(PackedRows, "__getitem__", second_is_a_token)
    found = losses(train_here(tmp_path, "--max_steps", "4", "--batch_size", "1", "--dataloader_num_workers", "0"))
    assert found[1] == 0
    assert all(math.isfinite(loss) and loss > 1 for loss in [found[0], *found[2:]])
