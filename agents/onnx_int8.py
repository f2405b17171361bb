"""``quantize_onnx``: an exported graph with linear layers in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prunevit.agents.onnx_graphs import ExportError
from prunevit.extras import needs

Int8 = Literal["dynamic", "static"]
LINEAR = ("MatMul", "Gemm")
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch writes which module a node comes from


def quantize_onnx(
    file: Path | str, out: Path | str, int8: Int8, calibration: Tensor | None = None
) -> None:
    """Quantises the linear layers of the blocks and the head: weights a channel, activations a
    tensor. Attention and the policy stay in float32, since rounding would change decisions.

    Args:
        file: what ``export_onnx`` wrote.
        out: where the quantised graph is written.
        int8: "dynamic" scales activations by what they are in each call, "static" by what they were
            on the images of ``calibration``.
        calibration: images [n, C, H, W], for "static".

    Raises:
        ExportError: there is nothing to quantise, or nothing to calibrate on.
        ImportError: the libraries of the extra ``onnx`` are missing.
    """
    with needs("onnx"):
        import onnx
        from onnxruntime import quantization
    if int8 == "static" and (calibration is None or not len(calibration)):
        raise ExportError("int8='static' needs images to calibrate on, as photos:PATH")
    model = onnx.load(str(file))
    weights = {weight.name for weight in model.graph.initializer}
    linear: list[str] = []
    kept: list[str] = []
    for node in model.graph.node:
        if node.op_type in LINEAR and weights.intersection(node.input):
            of_policy = any(p.key == SCOPES and "'policy" in p.value for p in node.metadata_props)
            (kept if of_policy else linear).append(node.name)
    kept += [f"{name}_MatMul" for name in kept]  # what a quantiser makes of a Gemm
    if not linear:
        raise ExportError(f"{file} has no linear layers, so int8 has nothing to quantise")
    settings: dict[str, Any] = {
        "model_input": model,
        "model_output": str(out),
        "op_types_to_quantize": list(LINEAR),
        "nodes_to_exclude": kept,
        "per_channel": True,
        # attention multiplies activations with each other
        "extra_options": {"MatMulConstBOnly": True},
        "use_external_data_format": Path(f"{file}.data").exists(),
    }
    # the exporter has folded constants and inferred shapes, which quantisers ask for
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    if int8 == "dynamic":
        quantization.quantize_dynamic(**settings)
    else:
        assert calibration is not None
        settings["activation_type"] = quantization.QuantType.QUInt8  # the faster kind on x86
        quantization.quantize_static(calibration_data_reader=_Reader(calibration), **settings)


class _Reader:
    """Images one by one, as onnxruntime's ``CalibrationDataReader``."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(images.split(1))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image.cpu().numpy()}
