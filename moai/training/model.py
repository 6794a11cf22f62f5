"""The model: a JSON of moai's fields or of transformers', or a saved model; checked against tokenizer and data before
anything runs.

moai's own fields (vocab_size, hidden_size, ..., use_qk_norm) describe what transformers calls Qwen3: pre-norm RMSNorm,
grouped-query attention with QK norm, SwiGLU, RoPE, so that every tool that reads Qwen3 reads a moai model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError, DamagedError
from moai.training import sizes, vocabulary
from moai.training.checkpoints import weights_problem

logger = logging.getLogger(__name__)

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAME = (
    *_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_dropout", "initializer_range", "use_cache", "attention_bias", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_MAPPED = ("rope_theta", "rope_scaling", "use_qk_norm", "hidden_act", "mlp_bias")
_IGNORED = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def load_config(model_config: str | None, pretrained_model: str | None) -> Any:
    """The transformers configuration of either. Raises ConfigError or DamagedError naming the file and the field."""
    if pretrained_model:
        if model_config:
            what = f"--pretrained_model {pretrained_model} brings its own configuration"
            logger.info("%s; --model_config %s is not read", what, model_config)
        return _saved_config(Path(pretrained_model))
    return _new_config(str(model_config))


def config_of_size(size: str, *, vocab_size: int, seq_len: int) -> Any:
    """The transformers configuration of one of sizes.SIZES."""
    return _moai_config(f"--model_size {size}", sizes.fields(size, vocab_size=vocab_size, seq_len=seq_len))


def architecture(config: Any) -> Any:
    """The class of the causal language model that a configuration describes. Raises ConfigError where there is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ConfigError(
            f"model_type {config.model_type!r} has no causal language model in transformers; name one that has, or "
            f"leave model_type out"
        )
    return mapping[type(config)]


def build_model(
    config: Any,
    *,
    pretrained_model: str | None,
    attention: str,
    special_ids: Mapping[str, int | None],
    seed: int,
    ids: int = 0,
    device: str = "cpu",
) -> Any:
    """A new model with weights that follow from `seed`, the same on every rank, or a saved one. In 32 bits, without a
    cache, on `device`.

    special_ids  eos_token_id and so on as the tokenizer has them; they win over the configuration's
    ids          a saved model with fewer gets new rows (training/vocabulary.py)
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    untyped: Any = AutoModelForCausalLM
    if pretrained_model:
        model = _load_saved(Path(pretrained_model), attention)
        vocabulary.grow(model, ids, seed=seed)
        model.to(device)
    else:
        set_seed(seed)
        try:
            with torch.device(device):
                model = untyped.from_config(
                    config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
                )
        except ValueError as error:
            raise ConfigError(f"--model_config: {_one_line(error)}") from error
    _align_special_ids(model, special_ids)
    model.config.use_cache = False
    return model


def check_early(
    *, model_config: str | None, pretrained_model: str | None, vocab_size: int | None, seq_len: int
) -> None:
    """What `check_fit` will say, as far as the JSON alone tells it: before the data is prepared, and without torch."""
    path = str(model_config)
    if pretrained_model and Path(pretrained_model).is_dir():
        path = str(Path(pretrained_model) / "config.json")
        if not Path(path).exists():
            raise ConfigError(
                f"--pretrained_model {pretrained_model}: has no config.json, so it is no saved model; a finished run "
                f"leaves one as OUTPUT_DIR/final_model"
            )
    fields, needed = _read(path, pretrained_model), 0 if pretrained_model else vocab_size or 0
    known, longest = fields.get("vocab_size"), fields.get("max_position_embeddings")
    _check(known, longest, needed, f"the tokenizer's {vocab_size} ids", seq_len)


def check_fit(config: Any, *, ids: int, seq_len: int, pretrained: bool = False) -> None:
    """Refuse a model that cannot take the positions of the data, or its ids: a pretrained one grows with them. Raises
    ConfigError.
    """
    config, needed = config.get_text_config(), 0 if pretrained else ids
    longest = getattr(config, "max_position_embeddings", None)
    _check(config.vocab_size, longest, needed, f"the {needed} ids of tokenizer and data", seq_len)


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, without the embeddings); tied weights count once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    return total, total - sum(embeddings.values())


def _check(vocab_size: Any, longest: Any, needed: int, of: str, seq_len: int) -> None:
    if isinstance(vocab_size, int) and vocab_size < needed:
        raise ConfigError(
            f"the model's vocab_size {vocab_size} is below {of}; set vocab_size to {needed} or more in --model_config"
        )
    if isinstance(longest, int) and seq_len > longest:
        raise ConfigError(
            f"--seq_len {seq_len} is above the model's max_position_embeddings {longest}: shorten the rows or raise it "
            f"in --model_config"
        )


def _read(path: str, pretrained_model: str | None = None) -> dict[str, Any]:
    flag = "--pretrained_model" if pretrained_model else "--model_config"
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{flag} {path}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{flag} {path}: expected names and values at the top, found {type(fields).__name__}")
    return fields


def _new_config(path: str) -> Any:
    fields = _read(path)
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type", "moai")
    if kind not in CONFIG_MAPPING and kind != "moai":
        raise ConfigError(
            f"{path}: model_type {kind!r} is unknown; leave it out for moai's own fields, or name one that "
            f"transformers has"
        )
    try:
        return _moai_config(path, fields) if kind == "moai" else CONFIG_MAPPING[kind].from_dict(fields)
    except ConfigError:
        raise
    except Exception as error:  # each configuration class refuses in its own way
        raise ConfigError(f"{path}: {_one_line(error)}") from error


def _saved_config(directory: Path) -> Any:
    if not directory.is_dir():
        raise ConfigError(
            f"--pretrained_model {directory}: no such directory; a finished run leaves one as OUTPUT_DIR/final_model "
            f"(./pretrain.sh makes it)"
        )
    if reason := weights_problem(directory):
        raise DamagedError(f"--pretrained_model {directory}: not a saved model in safetensors ({reason})")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"--pretrained_model {directory}: {_one_line(error)}") from error


def _moai_config(path: str, fields: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    known = (*_SAME, *_MAPPED, *_IGNORED)
    for name in fields:
        if name not in known:
            raise ConfigError(f"{path}: unknown field {name!r}{did_you_mean(name, known)}")
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} missing")
    for name in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = fields.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{path}: {name} = {value!r} is not a whole number above 0")
    _refuse_other_architectures(path, fields)
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if fields.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}; change one or give head_dim"
        )
    if heads % (fields.get("num_key_value_heads") or heads):
        raise ConfigError(
            f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {fields['num_key_value_heads']}"
        )
    made = {
        "head_dim": fields.get("head_dim") or hidden // heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "hidden_act": "silu",
        "rope_parameters": _rope(fields),
    }
    return Qwen3Config(**{name: fields[name] for name in _SAME if name in fields} | made)


def _refuse_other_architectures(path: str, fields: Mapping[str, Any]) -> None:
    for name, only, other in (("use_qk_norm", True, "false"), ("mlp_bias", False, "true")):
        if bool(fields.get(name, only)) is not only:
            raise ConfigError(
                f"{path}: {name} {other} is another architecture; set it {str(only).lower()}, or give a transformers "
                f"configuration with model_type llama"
            )
    if fields.get("hidden_act", "swiglu") not in ("swiglu", "silu"):
        raise ConfigError(
            f"{path}: hidden_act {fields['hidden_act']!r}: the MLP is SwiGLU, so swiglu (or its inner name, silu)"
        )


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`{"type": "yarn", "factor": 4.0}` under its older and newer spelling -> transformers 5's one dictionary."""
    scaling = dict(fields.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.get("rope_type", "default")
    return {**scaling, "rope_type": kind, "rope_theta": float(fields.get("rope_theta", 1e6))}


def _load_saved(directory: Path, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    try:
        model, loading = untyped.from_pretrained(
            str(directory),
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"--pretrained_model {directory}: {_one_line(error)}") from error
    lost = sorted(loading["missing_keys"]) + sorted(map(str, loading.get("mismatched_keys", ())))
    if lost:
        raise DamagedError(
            f"--pretrained_model {directory}: {len(lost)} weights are not there or of another shape, the first: "
            f"{lost[0]}"
        )
    return model


def _align_special_ids(model: Any, special_ids: Mapping[str, int | None]) -> None:
    config = model.config.get_text_config()
    for name, value in special_ids.items():
        if value is None:
            continue
        if (said := getattr(config, name, None)) not in (None, value):
            logger.info("%s = %s: the tokenizer's; the model's configuration says %s", name, value, said)
        setattr(config, name, value)
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
