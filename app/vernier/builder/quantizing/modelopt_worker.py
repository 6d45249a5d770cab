"""Asks NVIDIA ModelOpt what it would quantize; runs in a process, and perhaps an environment, of its own.

ModelOpt pins other versions of onnx and ONNX Runtime than the builder, prints as it pleases and may take
the process with it, so nothing of `app` is imported here:

    python modelopt_worker.py request.json

The request names `model`, `data` (.npz), `precision`, `nodes` (name → activations) and `out`, a JSON
file that gets `nodes`, `ranges` (activation → INT8 scale) and `fp32` (nodes to keep in FP32).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text("utf-8"))
    answer = _quantized(request) if request["precision"] in ("int8", "fp8") else _narrow(request)
    Path(request["out"]).write_text(json.dumps(answer), "utf-8")


def _quantized(request: dict[str, Any]) -> dict[str, Any]:
    from modelopt.onnx.quantization import quantize

    with np.load(request["data"], allow_pickle=False) as archive:
        data = {name: archive[name] for name in archive.files}
    output = request["model"] + ".quantized.onnx"
    quantize(
        request["model"],
        quantize_mode=request["precision"],
        calibration_data=data,
        calibration_method="max" if request["precision"] == "fp8" else "entropy",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        use_external_data_format=bool(request["large"]),
        output_path=output,
        log_level="ERROR",
    )
    graph = onnx.load(output).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = numpy_helper.to_array(attribute.t)
    ranges: dict[str, float] = {}
    nodes = []
    for node in graph.node:
        found = {}
        for name in node.input:
            pair = _pair(name, makers)
            if pair and pair[1] in constants and constants[pair[1]].size == 1:
                found[pair[0]] = float(constants[pair[1]].reshape(-1)[0])
        wanted = request["nodes"].get(node.name)
        if wanted is not None and set(wanted) <= set(found):
            nodes.append(node.name)
            # ModelOpt 0.47 makes FP8 scales by multiplying INT8's with 448/127, where it should divide: FP8's
            # largest number is 448, so its scales are the smaller ones.
            if request["precision"] == "int8":
                ranges.update({name: found[name] for name in wanted})
    return {"nodes": nodes, "ranges": ranges, "fp32": []}


def _pair(name: str, makers: dict[str, Any]) -> tuple[str, str] | None:
    """The value before a Q/DQ pair and the name of its scale."""
    after = makers.get(name)
    if after is None or after.op_type != "DequantizeLinear":
        return None
    before = makers.get(after.input[0])
    if before is None or before.op_type != "QuantizeLinear":
        return None
    return before.input[0], after.input[1]


def _narrow(request: dict[str, Any]) -> dict[str, Any]:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    converted = convert_to_mixed_precision(
        request["model"],
        low_precision_type=request["precision"],
        keep_io_types=True,
        calibration_data=request["data"],
    )
    inferred = onnx.shape_inference.infer_shapes(converted).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.output]}
    fp32 = [
        node.name
        for node in inferred.node
        if node.name in request["all_nodes"]
        and any(types.get(o) == onnx.TensorProto.FLOAT for o in node.output)
    ]
    return {"nodes": [], "ranges": {}, "fp32": fp32}


if __name__ == "__main__":
    main(sys.argv[1])
