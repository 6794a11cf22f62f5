"""The transformer of a sentence model in ONNX Runtime or OpenVINO; pooling and normalizing stay where they are.

    transformer = open_runtime("openvino", model[0], precision="bfloat16", threads=2, type_ids=True, cache=folder)
    features = transformer(features)                   # adds token_embeddings, as model[0] would

Exported once and kept, by the model's revision and the library's version: loading was 25 to 112 s before. Exported
here: the exporters that sentence-transformers calls pin versions of transformers older than moai's. int8 is
ONNX Runtime's: weights per channel, activations as they come.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError

logger = logging.getLogger(__name__)

_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_NEEDS = {"onnx": "onnxruntime onnx", "openvino": "openvino"}
_OPSET = 17
_EXAMPLE = (2, 16)
"""Rows and tokens of the example that is traced; one row is padded, so that the mask is not taken for a constant."""

Features = dict[str, Any]


def open_runtime(
    backend: str, transformer: Any, *, precision: str, threads: int, type_ids: bool, cache: Path
) -> Callable[[Features], Features]:
    """`cache` is this model's own directory, where an export is kept and found again. Raises ConfigError naming the
    package to install, or the precision that this backend has not.
    """
    names = _NAMES if type_ids else _NAMES[:2]
    try:
        run = (_onnx if backend == "onnx" else _openvino)(transformer, names, precision, threads, cache)
    except ImportError as error:
        raise ConfigError(
            f"--backend {backend} needs a package that is not installed ({error.name}): pip install {_NEEDS[backend]}"
        ) from error

    def call(features: Features) -> Features:
        import torch

        found = run([features[name].cpu().numpy() for name in names])
        return {**features, "token_embeddings": torch.from_numpy(found)}

    return call


def exported(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder with what `write` puts into it: once, and whole or not there at all."""
    if folder.is_dir():
        logger.info("The exported model is taken from %s", folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as part:
        write(Path(part) / folder.name)
        with contextlib.suppress(OSError):  # another process was first: its export is as good
            (Path(part) / folder.name).rename(folder)
    return folder


def _traced(transformer: Any, names: tuple[str, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A module whose arguments are `names` in order, and an example of them."""
    import torch

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer.auto_model

        def forward(self, *inputs: Any) -> Any:
            return self.inner(**dict(zip(names, inputs))).last_hidden_state

    ids = torch.full(_EXAMPLE, 5, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, _EXAMPLE[1] // 2 :] = 0
    return Hidden().eval(), (ids, mask, torch.zeros_like(ids))[: len(names)]


def _onnx(
    transformer: Any, names: tuple[str, ...], precision: str, threads: int, cache: Path
) -> Callable[[list[Any]], Any]:
    import onnxruntime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if precision == "bfloat16":
        raise ConfigError("--backend onnx has float32 and int8, no bfloat16: use --backend torch or openvino for it")

    def export(folder: Path) -> None:
        folder.mkdir()
        path = folder / "model.onnx"
        axes = {name: {0: "rows", 1: "tokens"} for name in (*names, "hidden")}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that are constant on purpose
            how: dict[str, Any] = {"dynamic_axes": axes, "dynamo": False, "opset_version": _OPSET}
            traced = _traced(transformer, names)
            torch.onnx.export(*traced, str(path), input_names=list(names), output_names=["hidden"], **how)
        if precision == "int8":
            whole = path.rename(folder / "float32.onnx")
            quantize_dynamic(str(whole), str(path), weight_type=QuantType.QInt8, per_channel=True)
            whole.unlink()

    folder = exported(cache / f"onnx-{precision}-opset{_OPSET}-{onnxruntime.__version__}-{len(names)}", export)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(zip(names, inputs)))[0]


def _openvino(
    transformer: Any, names: tuple[str, ...], precision: str, threads: int, cache: Path
) -> Callable[[list[Any]], Any]:
    import openvino
    import torch

    if precision == "int8":
        raise ConfigError("--backend openvino has float32 and bfloat16 here; int8 is --backend onnx")

    def export(folder: Path) -> None:
        folder.mkdir()
        module, example = _traced(transformer, names)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(module, example_input=example)
        openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)

    folder = exported(cache / f"openvino-{openvino.__version__.partition('-')[0]}-{len(names)}", export)
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    compiled = openvino.Core().compile_model(
        folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    )
    return lambda inputs: compiled(inputs)[0].copy()
