"""sentence-transformers models as encoders: which model, how many tokens it reads, in which precision.

    model = SentenceModel.find("intfloat/multilingual-e5-small")      # a local directory or a hub name
    model.revision                                                    # known without loading anything heavy
    encoder = model.open("bfloat16")                                  # now torch and sentence_transformers are imported

Tokenizing is moai's, pooling and normalizing are the model's own and always in float32.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.errors import ConfigError, SourceError, TokenizerError
from moai.core.files import digest_file, digest_json
from moai.core.hub import absent
from moai.core.without_pandas import with_pandas
from moai.reembedding.embed import OutOfMemory, Vectors, padded

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "int8")
BACKENDS = ("torch", "onnx", "openvino")
_NOT_THE_MODEL = ("onnx", "openvino", ".git", ".cache")
"""Folders of a model's directory that hold the same model in other forms, or none."""
_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".vocab")


@dataclass(frozen=True)
class SentenceModel:
    """A model by name, not loaded."""

    name: str
    """As a person wrote it: a directory or a hub name."""
    revision: str
    directory: str | None = None
    device: str = "cpu"
    backend: str = "torch"
    threads: int = 1
    exports: Path = Path("~/.cache/moai/exports")
    """Where models that were exported for another backend are kept."""

    @classmethod
    def find(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        backend: str = "torch",
        threads: int = 1,
        exports: Path = Path("~/.cache/moai/exports"),
    ) -> SentenceModel:
        """Raises SourceError where there is no such model, with the way out."""
        directory = Path(name).expanduser()
        if directory.is_dir():
            if not (directory / "config.json").is_file() and not (directory / "modules.json").is_file():
                raise SourceError(
                    f"{name}: no model: neither config.json nor modules.json is in it; set EMBEDDING_MODEL or --model "
                    f"to the model's directory"
                )
            return cls(name, _digest(directory), str(directory), device, backend, threads, exports)
        return cls(name, *_from_hub(name, revision), device, backend, threads, exports)

    def open(self, precision: str) -> SentenceEncoder:
        assert precision in PRECISIONS, precision
        return SentenceEncoder(self, precision)


class SentenceEncoder:
    """A loaded model. Raises TokenizerError where its tokenizer gives no offsets, ConfigError without the backend."""

    def __init__(self, model: SentenceModel, precision: str) -> None:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _SHAPES)
        with_pandas()  # what sentence_transformers imports asks for it
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        self._torch = torch
        device = device_of(model.device)
        self._device = torch.device(device)
        # Several batches at a time: threads that share one batch wait for each other after every operation.
        self.lanes = min(model.threads, MOST_LANES) if self._device.type == "cpu" and model.backend == "torch" else 1
        torch.set_num_threads(max(1, model.threads // self.lanes))
        self._model: Any = SentenceTransformer(model.directory or model.name, device=device, trust_remote_code=False)
        self._model.eval()
        self.precision = precision
        self.dim = int(self._model.get_embedding_dimension() or self._model.encode(["가"]).shape[-1])
        self.tokens = TokenizerTokens(self._model)
        self._transformer: Any
        self._transformer, *self._after = self._model.children()
        self._type_ids = "token_type_ids" in getattr(self._model.tokenizer, "model_input_names", [])
        if model.backend != "torch":
            from moai.reembedding.runtimes import open_runtime

            self._transformer = open_runtime(
                model.backend,
                self._transformer,
                precision=precision,
                threads=model.threads,
                type_ids=self._type_ids,
                cache=model.exports.expanduser() / model.revision,
            )
        elif precision == "bfloat16":
            self._transformer.to(torch.bfloat16)
        elif precision == "int8":
            raise ConfigError("--precision int8 needs --backend onnx; with torch choose float32 or bfloat16")

    def encode(self, rows: Sequence[Sequence[int]]) -> Vectors:
        torch = self._torch
        features = self._features(rows)
        try:
            with torch.inference_mode():
                features = self._transformer(features)
                features["token_embeddings"] = features["token_embeddings"].float()
                for module in self._after:
                    features = module(features)
                vectors = torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)
                found: Vectors = vectors.cpu().numpy()
                return found
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
        # Outside of the handler: the traceback there still holds the tensors of the failed batch.
        del features
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory

    def _features(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        longest = max(map(len, rows))
        longest = min(padded(longest), max(longest, self.tokens.max_tokens))  # there are no positions beyond the limit
        ids = np.full((len(rows), longest), self.tokens.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for place, row in enumerate(rows):
            side = slice(longest - len(row), longest) if self.tokens.pads_left else slice(0, len(row))
            ids[place, side] = row
            mask[place, side] = 1
        features = {"input_ids": ids, "attention_mask": mask}
        if self._type_ids:
            features["token_type_ids"] = np.zeros_like(ids)
        return {name: self._torch.from_numpy(array).to(self._device) for name, array in features.items()}

    @cached_property
    def batch_tokens(self) -> int:
        """On a CPU what its caches like, on a GPU a half of the free memory, up to what fills any of today's."""
        if self._device.type != "cuda":
            return CPU_TOKENS
        free, _ = self._torch.cuda.mem_get_info(self._device)
        config = getattr(getattr(self._model[0], "auto_model", None), "config", None)
        # What a token may need at the peak of a layer, an estimate: 64 activations of the hidden size.
        bytes_per_token = (
            64 * int(getattr(config, "hidden_size", self.dim)) * (2 if self.precision == "bfloat16" else 4)
        )
        return int(max(2048, min(GPU_TOKENS, free // 2 // bytes_per_token)))


class TokenizerTokens:
    """The model's tokenizer without truncation and padding, with the prompts of the model's authors."""

    def __init__(self, model: Any) -> None:
        fast = getattr(model.tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise TokenizerError(
                f"{type(model.tokenizer).__name__} has no tokenizer.json: only a fast tokenizer tells where its tokens "
                f"stand in the text"
            )
        # tokenizer.json may carry a truncation shorter than the model (128 of 256 tokens in all-MiniLM-L6-v2).
        self._tokenizer = copy.deepcopy(fast)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prompt = _prompt(model, "document", "passage", "corpus")
        self._question = _prompt(model, "query")
        self.max_tokens = _limit(model)
        pad = getattr(model.tokenizer, "pad_token_id", None)
        self.pad_id = 0 if pad is None else int(pad)
        self.pads_left = getattr(model.tokenizer, "padding_side", "right") == "left"

    def spans(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.offsets, np.int64).reshape(-1, 2) for encoding in encodings]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        prompted = [self._prompt + text for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(prompted, add_special_tokens=True)]

    def question_ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(self._question + text, add_special_tokens=True).ids)


def device_of(wanted: str) -> str:
    """ "auto" is the first CUDA device where torch sees one."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_SHAPES = "16"
"""Programs that oneDNN keeps, one for each shape of an operation: by default 1,024 of some MB."""
CPU_TOKENS = 1024
"""On two cores a fifth faster than the best fixed batch; 4,096 were slower than it (benchmarks/RESULTS.md)."""
MOST_LANES = 8
"""Each holds the activations of a device batch."""
GPU_TOKENS = 65_536


def _limit(model: Any) -> int:
    of_tokenizer = min(int(getattr(model.tokenizer, "model_max_length", 512)), 1_000_000)
    limit = getattr(model, "max_seq_length", None) or of_tokenizer
    config = getattr(model[0].auto_model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in str(getattr(config, "model_type", "")):
        positions -= 2  # its positions begin behind the padding id
    return int(min(limit, positions) if positions and positions > 0 else limit)


def _prompt(model: Any, *names: str) -> str:
    """As `encode_document` and `encode_query` choose it, but that an empty prompt does not hide the next name's."""
    prompts = model.prompts or {}
    return str(next(filter(None, (prompts.get(name) for name in (*names, model.default_prompt_name))), ""))


def _digest(directory: Path) -> str:
    """Of the files that make the model: the same model at another place is the same."""
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.suffix in _MODEL_SUFFIXES
        and not set(path.relative_to(directory).parts[:-1]) & set(_NOT_THE_MODEL)
    ]
    found = [[str(path.relative_to(directory)), path.stat().st_size, digest_file(path)] for path in files]
    return digest_json(found)[:40]


def _from_hub(name: str, revision: str | None) -> tuple[str, str]:
    """(commit, directory in the hub's cache). Raises SourceError."""
    from huggingface_hub import snapshot_download

    others = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]
    try:
        directory = snapshot_download(name, revision=revision, local_files_only=True)
        logger.info("%s: the copy in the Hub's cache, %s", name, directory)
    except Exception:
        logger.info("%s: no directory here and not in the Hub's cache; asking the Hub for it", name)
        try:
            directory = snapshot_download(name, revision=revision, ignore_patterns=others)
        except Exception as error:
            raise SourceError(f"{absent(name, error)} (--model DIR or EMBEDDING_MODEL)") from error
    return Path(directory).name, directory


def _is_memory(error: BaseException) -> bool:
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in said)
