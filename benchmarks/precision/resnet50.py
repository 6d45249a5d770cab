"""A network of ResNet-50's exact size (He et al. 2015) with random weights, for timing alone; needs no torch.

Residual branches start small and activations are normalized, so that ranges look like those of a
trained network; what it answers means nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.precision.data import Array
from benchmarks.precision.exhibit import Exhibit

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
EXPANSION, CLASSES, PIXELS = 4, 1000, 224
#: Of one picture in FP32.
SAMPLE_BYTES = 3 * PIXELS * PIXELS * 4
#: What the last normalization of a residual branch multiplies with.
_BRANCH_GAIN = 0.2
_SEED = 20


def make(folder: Path, samples: int = 256) -> Exhibit:
    """The exhibit, drawn now unless the folder has it already; for times and sizes, not for accuracy."""
    source = inspect.getsource(sys.modules[__name__])
    home = folder / f"resnet50-{hashlib.sha256(source.encode()).hexdigest()[:12]}-{samples}"
    data = home / "pictures.npz"
    exhibit = Exhibit("resnet50", "ResNet-50 (random weights)", home / "model.onnx", data, data, data)
    if not exhibit.model.exists():
        home.mkdir(parents=True, exist_ok=True)
        np.savez(data, image=pictures(samples, _SEED + 1))
        exhibit.model.write_bytes(make_model(_SEED).SerializeToString())
    return exhibit


def pictures(samples: int, seed: int) -> Array:
    """Coarse noise, so that neighbouring pixels have something in common: float32 [samples, 3, 224, 224]."""
    coarse = np.random.default_rng(seed).standard_normal((samples, 3, 14, 14), np.float32)
    return coarse.repeat(16, axis=2).repeat(16, axis=3)


def make_model(seed: int) -> ModelProto:
    """Images `image` [batch, 3, 224, 224] to `logits` [batch, 1000]; 25.6 million parameters in FP32."""
    network = _Network(seed)
    network.normalize(pictures(8, seed))
    return network.model()


class _Network:
    """Nodes and weights; normalizations learn their statistics from one batch."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[NodeProto] = []
        self._weights: dict[str, Array] = {}
        x = self._relu(self._conv("image", 3, 64, 7, 2))
        x = self._add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        width_in = 64
        for width, depth, stride in STAGES:
            for index in range(depth):
                x = self._bottleneck(x, width_in, width, stride if index == 0 else 1)
                width_in = width * EXPANSION
        x = self._add("Flatten", [self._add("GlobalAveragePool", [x])], axis=1)
        self._weights["classify.weight"] = self._draw((CLASSES, width_in), 2 * width_in)
        self._weights["classify.bias"] = np.zeros(CLASSES, np.float32)
        self._nodes.append(
            helper.make_node(
                "Gemm", [x, "classify.weight", "classify.bias"], ["logits"], "classify", transB=1
            )
        )

    def normalize(self, images: Array) -> None:
        """Sets every normalization's mean and variance to those of this batch."""
        learning = self.model()
        learned = []
        for node in learning.graph.node:
            if node.op_type == "BatchNormalization":
                node.output.extend([f"{node.name}.new_mean", f"{node.name}.new_var"])
                node.attribute.extend(
                    [helper.make_attribute("training_mode", 1), helper.make_attribute("momentum", 0.0)]
                )
                learned += [(f"{node.name}.mean", node.output[1]), (f"{node.name}.var", node.output[2])]
        del learning.graph.output[:]
        learning.graph.output.extend(
            helper.make_tensor_value_info(made, TensorProto.FLOAT, None) for _, made in learned
        )
        session = ort.InferenceSession(learning.SerializeToString(), providers=["CPUExecutionProvider"])
        for (name, _), value in zip(learned, session.run(None, {"image": images}), strict=True):
            self._weights[name] = np.asarray(value, np.float32)

    def model(self) -> ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "resnet50",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, PIXELS, PIXELS])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in self._weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    def _draw(self, shape: tuple[int, ...], fan_in: int) -> Array:
        scale = np.float32(np.sqrt(2 / fan_in))
        return self._random.standard_normal(shape, np.float32) * scale

    def _add(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        name = f"{op_type.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def _relu(self, x: str) -> str:
        return self._add("Relu", [x])

    def _conv(
        self, x: str, inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = 1.0
    ) -> str:
        weight = f"conv{len(self._nodes)}.weight"
        self._weights[weight] = self._draw((outputs, inputs, kernel, kernel), inputs * kernel * kernel)
        pads = [kernel // 2] * 4
        x = self._add("Conv", [x, weight], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)
        name = f"batchnormalization{len(self._nodes)}"
        values = {"gain": gain, "shift": 0.0, "mean": 0.0, "var": 1.0}
        self._weights.update({f"{name}.{k}": np.full(outputs, v, np.float32) for k, v in values.items()})
        return self._add("BatchNormalization", [x, *(f"{name}.{key}" for key in values)])

    def _bottleneck(self, x: str, inputs: int, width: int, stride: int) -> str:
        outputs = width * EXPANSION
        y = self._relu(self._conv(x, inputs, width, 1))
        y = self._relu(self._conv(y, width, width, 3, stride))
        y = self._conv(y, width, outputs, 1, gain=_BRANCH_GAIN)
        shortcut = self._conv(x, inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else x
        return self._relu(self._add("Add", [y, shortcut]))
