"""Try what was trained:  python -m moai generate --model outputs/demo --prompt "옛날에" --max_new_tokens 50

Text comes out as it is made, with a key-value cache. Standard output holds what was generated and nothing else (with
several prompts each has its own above it); which model it was, and how fast, is said on standard error.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai.core.config import option
from moai.core.errors import ConfigError, DamagedError
from moai.core.progress import Waiting
from moai.training.checkpoints import newest_complete, weights_problem

if TYPE_CHECKING:
    from moai.transforms.template import ChatTemplate

logger = logging.getLogger(__name__)

STDIN = "-"
_LONGEST_WAIT = 32
"""Tokens that may wait for a whole letter, which takes four; more are no text, and are shown as they are."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generation: a saved model and what it goes on with."""

    model: str = option("", "a saved model: final_model/, a checkpoint, or the output_dir of a run (required)")
    prompt: tuple[str, ...] = option((), "texts to go on with; - reads one from standard input (required)")
    tokenizer_path: str | None = option(None, "directory with tokenizer.json, where the model has none beside it")
    max_new_tokens: int = option(128, "tokens at most; the end of a text, or of a turn, ends it before")
    temperature: float = option(0.8, "0 takes the likeliest token each time; higher is more varied")
    top_p: float = option(0.95, "draw among the likeliest tokens that have this share of the probability together")
    seed: int | None = option(None, "draw the same again; each prompt begins from it")
    chat: bool = option(False, "put the prompt into the tokenizer's chat template, as what a user says")
    add_bos: bool = option(False, "begin with the BOS token, as the data did if it was prepared so")
    use_cpu: bool = option(False, "generate on the CPU; by default on an accelerator where there is one")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0, and at most 1")

    def require(self) -> GenerateConfig:
        """This configuration if it names a model and a prompt. Raises ConfigError with the missing flag."""
        if not self.model:
            raise ConfigError("no model: set --model DIR, a final_model/, a checkpoint or the output_dir of a run")
        if not self.prompt:
            raise ConfigError('no prompt: set --prompt "TEXT", or --prompt - to read it from standard input')
        return self


def generate(config: GenerateConfig, *, write: Callable[[str], Any] = sys.stdout.write) -> None:
    """Write a continuation of every prompt. Raises ConfigError or DamagedError, naming what is missing and where."""
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == STDIN else prompt for prompt in config.prompt]
    with Waiting("Loading the model"):
        model, tokenizer = load(config)
    for prompt in prompts:
        if len(prompts) > 1:
            write(f"> {prompt}\n")
        _continue(model, tokenizer, _ids(tokenizer, prompt, config), config, write)


def load(config: GenerateConfig) -> tuple[Any, Any]:
    """The model, ready to generate, and its tokenizer."""
    directory = saved_model(Path(config.model))
    beside = Path(config.tokenizer_path or directory)
    folder = beside.parent if beside.name == "tokenizer.json" else beside
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder}: no tokenizer.json; name the directory of the tokenizer the model was trained with: "
            f"--tokenizer_path DIR"
        )
    if config.chat:
        _check_template(folder)
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging as library

    for quiet in ("disable_progress_bar", "set_verbosity_error"):
        getattr(library, quiet)()
    untyped: Any = AutoModelForCausalLM
    found = None if config.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        model = untyped.from_pretrained(
            str(directory),
            dtype=torch.bfloat16 if found else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{directory}: {' '.join(str(error).split())[:300]}") from error
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise ConfigError(
            f"{folder}: {len(tokenizer)} ids, the model has {rows}; it is not the tokenizer this model was trained with"
        )
    model = model.eval().to(found or "cpu")
    logger.info("%s: %s on %s", directory, type(model).__name__, model.device.type)
    return model, tokenizer


class Stream:
    """What transformers hands every new token to: writes what it adds to the text, once it is whole letters.

    A token is decoded behind those before it, since many decoders drop a space at the beginning, but not behind all of
    them: each time those that made the piece `shown` last, and those `waiting` since. So a token costs the same however
    long the text is.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens = 0
        self.shown: list[int] = []
        self.waiting: list[int] = []
        self._prompt_is_next = True

    def put(self, ids: Any) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in ids.flatten().tolist():
            self.tokens += 1
            self.waiting.append(token)
            text = self._new_text()
            if len(self.waiting) >= _LONGEST_WAIT or (text and not text.endswith("\ufffd")):
                self.write(text)
                self.shown, self.waiting = self.waiting if text else self.shown, []

    def end(self) -> None:
        self.write(self._new_text() + "\n")

    def _new_text(self) -> str:
        return self._decoded(self.shown + self.waiting)[len(self._decoded(self.shown)) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _continue(model: Any, tokenizer: Any, ids: list[int], config: GenerateConfig, write: Callable[[str], Any]) -> None:
    import torch
    from transformers import set_seed

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = int(min(config.max_new_tokens, longest - len(ids)))
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the model takes {longest} with what it generates: shorten the prompt"
        )
    if room < config.max_new_tokens:
        logger.warning(
            "max_new_tokens = %d: the model takes %d tokens, %d of them are the prompt's", room, longest, len(ids)
        )
    if config.seed is not None:
        set_seed(config.seed)
    drawing = (
        {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.temperature
        else {"do_sample": False}
    )
    stream, started = Stream(tokenizer, write), time.monotonic()
    given = torch.tensor([ids], device=model.device)
    # use_cache: what was saved after training says no, because packed rows are trained without one.
    model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=room,
        use_cache=True,
        streamer=stream,
        eos_token_id=_stops(model, tokenizer, config) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **drawing,
    )
    seconds = time.monotonic() - started
    logger.info("%d tokens after %d, %.1f tokens/s", stream.tokens, len(ids), stream.tokens / max(seconds, 1e-9))


def _ids(tokenizer: Any, prompt: str, config: GenerateConfig) -> list[int]:
    if config.chat:
        from moai.transforms.shapes import BadRecord

        try:
            prompt = _template(tokenizer).render([{"role": "user", "content": prompt}], prompt=True)[0]
        except BadRecord as error:
            raise ConfigError(f"--chat: the chat template does not take a prompt ({error})") from error
    elif config.add_bos and tokenizer.bos_token_id is None:
        raise ConfigError("--add_bos: this tokenizer names no bos_token; leave --add_bos out")
    begun = [tokenizer.bos_token_id] * (config.add_bos and not config.chat)
    ids = begun + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError("the prompt is empty: give it at least one word to go on with")
    return ids


def _check_template(folder: Path) -> None:
    """Raises ConfigError where the tokenizer has no chat template: before anything slow is imported."""
    beside = [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]
    settings = folder / "tokenizer_config.json"
    if any(path.is_file() for path in beside) or (settings.is_file() and b'"chat_template"' in settings.read_bytes()):
        return
    raise ConfigError(
        f"--chat: {folder} has no chat template, so this model was not taught to answer. Teach it: train.py --mode sft "
        f"--pretrained_model {folder} --dataset CONVERSATIONS (docs/instruction-tuning.md); without --chat it "
        f"continues a text"
    )


def _template(tokenizer: Any) -> ChatTemplate:
    """The tokenizer's own, on the day it is."""
    from moai.transforms.template import TOKENS, ChatTemplate

    own = tokenizer.chat_template
    return ChatTemplate(
        source=own.get("default", "") if isinstance(own, dict) else own,
        tokens={name: token for name in TOKENS if (token := getattr(tokenizer, name, None))},
        date=date.today().isoformat(),
    )


def _stops(model: Any, tokenizer: Any, config: GenerateConfig) -> list[int]:
    """Ids at which generation ends: those that the model names, and in a chat what a turn ends with."""
    named = model.generation_config.eos_token_id
    stops = [named] if isinstance(named, int) else list(named or ())
    if config.chat:
        from moai.transforms.chat import turn_ends

        template = _template(tokenizer)
        ends = turn_ends(template, [token.content for token in tokenizer.added_tokens_decoder.values()])
        missing = [end for end in ends if tokenizer.convert_tokens_to_ids(end) not in stops]
        if missing:
            logger.warning("a turn ends with %s, which generation_config.json does not name", " or ".join(missing))
        stops += tokenizer.convert_tokens_to_ids(missing)
    return stops


def saved_model(path: Path) -> Path:
    """Where the weights are: `path` itself, or in the output_dir of a run its final model, else its newest checkpoint.
    Raises.
    """
    if not path.is_dir():
        raise ConfigError(f"--model {path}: no such directory; a finished run leaves one as OUTPUT_DIR/final_model")
    directory = path
    if not (path / "config.json").exists():
        inside: Iterable[Path | None] = (path / "final_model", newest_complete(path))
        directory = next((found for found in inside if found and found.is_dir()), path)
    if any(directory.glob("pytorch_model_fsdp_*")):
        raise ConfigError(
            f"{directory}: its weights are in parts, as FSDP writes them with SHARDED_STATE_DICT; join them first: "
            f"accelerate merge-weights"
        )
    if reason := weights_problem(directory):
        raise DamagedError(
            f"--model {directory}: not a saved model in safetensors ({reason}); name a final_model/, a checkpoint, or "
            f"the output_dir of a run"
        )
    return directory
