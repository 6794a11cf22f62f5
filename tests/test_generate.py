"""python -m moai generate: what the model would say, from a model that has learned to count, and one line for what cannot be opened."""

import io
import shutil

import pytest
import torch
from tiny_training import train_here

from moai.__main__ import main
from moai.config import resolve
from moai.errors import ConfigError, DamagedError
from moai.training.generate import GenerateConfig, Stream, generate, load

PROMPT = "+,-./012"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model trained for 40 steps on counting documents, with a checkpoint."""
    return train_here(tmp_path_factory.mktemp("run"), "--max_steps", "40", "--save_steps", "40", "--learning_rate", "1e-2", "--dataloader_num_workers", "0")


def said(run, *flags):
    out = io.StringIO()
    generate(resolve([GenerateConfig], ["--model", str(run), "--use_cpu", *flags], {}, prog="generate")[GenerateConfig].require(), write=out.write)
    return out.getvalue()


def test_greedy_is_argmax_without_a_cache(run):
    config = resolve([GenerateConfig], ["--model", str(run), "--prompt", PROMPT, "--use_cpu"], {}, prog="generate")[GenerateConfig]
    model, tokenizer = load(config)
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    new = []
    for _ in range(12):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    assert said(run, "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "12") == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert len(set(new)) > 3, "a model that says one letter for ever would prove little"


def test_a_seed_draws_the_same_again_and_each_prompt_begins_from_it(run):
    drawn = ["--temperature", "2", "--top_p", "1", "--max_new_tokens", "12"]
    alone = said(run, "--prompt", PROMPT, "--seed", "3", *drawn)
    assert said(run, "--prompt", "abc", PROMPT, "--seed", "3", *drawn).endswith(f"> {PROMPT}\n{alone}")
    assert alone != said(run, "--prompt", PROMPT, "--seed", "4", *drawn)


def test_a_prompt_may_come_from_standard_input_and_a_checkpoint_will_do(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    assert said(run / "checkpoint-40", "--prompt", "-", *greedy) == said(run, "--prompt", PROMPT, *greedy)


def test_the_chat_template_is_used(run, tmp_path):
    folder = shutil.copytree(run / "final_model", tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + PROMPT[:-1] + "{{ m.content }}{% endfor %}")
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    assert said(folder, "--chat", "--prompt", PROMPT[-1], *greedy) == said(run, "--prompt", PROMPT, *greedy)


def test_a_letter_is_written_when_all_its_bytes_are_there(run):
    tokenizer = load(resolve([GenerateConfig], ["--model", str(run), "--prompt", "x", "--use_cpu"], {}, prog="generate")[GenerateConfig])[1]
    pieces = []
    stream = Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for number in tokenizer("가a")["input_ids"]:
        stream.put(torch.tensor([number]))
    stream.end()
    assert [piece for piece in pieces if piece] == ["가", "a", "\n"]


def test_what_cannot_be_opened_is_one_line(run, tmp_path, capsys):
    without = shutil.copytree(run / "checkpoint-40", tmp_path / "checkpoint-40", ignore=shutil.ignore_patterns("tokenizer*"))
    parts = shutil.copytree(run / "final_model", tmp_path / "parts", ignore=shutil.ignore_patterns("*.safetensors"))
    empty = shutil.copytree(parts, tmp_path / "empty")
    (parts / "pytorch_model_fsdp_0").mkdir()
    for directory, kind, message in (
        (tmp_path / "nowhere", ConfigError, "no such directory"), (without, ConfigError, "--tokenizer_path DIR"), (empty, DamagedError, "model.safetensors is missing"),
        (parts, ConfigError, "accelerate merge-weights"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            said(directory, "--prompt", "a")
    assert said(without, "--prompt", PROMPT, "--tokenizer_path", str(run / "final_model"), "--max_new_tokens", "1")
    for flags, message in ((["--chat", "--prompt", "a"], "no chat template"), (["--prompt", ""], "is empty"), (["--prompt", "a" * 70], "takes 64")):
        with pytest.raises(ConfigError, match=message):
            said(run, *flags)
    assert main(["generate", "--prompt", "a"]) == 2
    assert "set --model DIR" in capsys.readouterr().err
