"""The same few steps computed in other ways: recomputed activations, bfloat16, compiled, eager attention. The losses must be those of the plain run."""

import pytest
from tiny_training import losses, train_here

STEPS = ("--max_steps", "5", "--learning_rate", "1e-2", "--dataloader_num_workers", "0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(train_here(tmp_path_factory.mktemp("plain"), *STEPS))


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [(["--gradient_checkpointing"], 1e-6), (["--attention", "eager"], 1e-5), (["--bf16"], 2e-2), (["--bf16", "--gradient_checkpointing"], 2e-2),
     pytest.param(["--compile"], 1e-4, marks=[pytest.mark.long, pytest.mark.filterwarnings("default")])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_losses_are_those_of_the_plain_run(flags, tolerance, plain, tmp_path):
    found = losses(train_here(tmp_path, *STEPS, *flags))
    assert len(found) == 5
    assert plain[0] - plain[-1] > 0.5, "the steps move the weights"
    assert found == pytest.approx(plain, abs=tolerance)
    if "--bf16" in flags:
        assert found != plain, "another number format rounds elsewhere"
