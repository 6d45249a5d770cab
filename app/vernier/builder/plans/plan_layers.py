"""Layers of a TensorRT network: pinning some to FP32 below TensorRT 10, and reporting them after a build."""

from __future__ import annotations

import json
import re
from typing import Any, Dict, Iterable, List, Set

from vernier.engine.trt_runtime.trt_api import TrtApi
from vernier.errors import EngineError

_SUFFIX = re.compile(r"_\d+$")
_UNNAMED = "(Unnamed Layer*"

#: Layers whose type is not a matter of choice: constants, shapes, and the Q/DQ pairs themselves.
_FREE = ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE")


def pin_to_fp32(api: TrtApi, network: Any, nodes: Iterable[str]) -> int:
    """Constrains the layers of `nodes` to FP32 and returns how many layers that were.

    The parser names a node's layer after the node, further layers of the node with a number behind,
    and leaves some of its helpers unnamed. A helper beside a pinned layer is pinned too: it might hold
    the same values, and one in FP16 could overflow between two FP32 layers.
    """
    wanted = set(nodes)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    pinned = {i for i, layer in enumerate(layers) if _belongs(layer.name, wanted)}
    neighbours = _neighbours(layers)
    pinned |= {
        i
        for i, layer in enumerate(layers)
        if layer.name.startswith(_UNNAMED) and not pinned.isdisjoint(neighbours[i])
    }
    count = 0
    for index in sorted(pinned):
        count += _pin(api, layers[index])
    return count


def _belongs(layer: str, nodes: Set[str]) -> bool:
    return layer in nodes or _SUFFIX.sub("", layer) in nodes


def _neighbours(layers: List[Any]) -> List[Set[int]]:
    """Per layer: the layers that make its inputs or read its outputs."""
    producer: Dict[str, int] = {}
    for index, layer in enumerate(layers):
        for k in range(layer.num_outputs):
            producer[layer.get_output(k).name] = index
    found: List[Set[int]] = [set() for _ in layers]
    for index, layer in enumerate(layers):
        for k in range(layer.num_inputs):
            tensor = layer.get_input(k)
            source = producer.get(tensor.name) if tensor is not None else None
            if source is not None:
                found[index].add(source)
                found[source].add(index)
    return found


def _pin(api: TrtApi, layer: Any) -> int:
    trt = api.module
    if str(layer.type).rpartition(".")[2] in _FREE:
        return 0
    floats = [k for k in range(layer.num_outputs) if layer.get_output(k).dtype == trt.float32]
    if not floats:
        return 0
    layer.precision = trt.float32
    for k in floats:
        layer.set_output_type(k, trt.float32)
    return 1


def layer_report(api: TrtApi, engine: Any) -> List[Dict[str, object]]:
    """The engine inspector's word on each layer of a loaded engine built with `detailed`.

    Raises EngineError when the engine tells nothing.
    """
    text = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"the engine inspector's report cannot be read: {error}") from error
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]
