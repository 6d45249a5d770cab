"""Every form of graph parses and builds, strongly typed, with tensorrt-rtx, which needs no GPU for that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx import ModelProto

from tests.support.quantized_graphs import Grower, full_recipe
from tests.unit.builder.architectures import ALL, data
from vernier.builder.graphs.shapes import specs
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.plans.plan import PlanOptions, build_plan
from vernier.package.manifest import DimRange

pytest.importorskip("tensorrt_rtx")


def build(model: ModelProto, capability: str = "8.9") -> bytes:
    options = PlanOptions(
        runtime="tensorrt-rtx",
        precision="int8",
        dims={"n": DimRange(min=1, opt=4, max=8)},
        compute_capabilities=(capability,),
    )
    return build_plan(model.SerializeToString(), specs(model.graph.input), options).data


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_int8_over_every_base_builds(kind: str, base: str) -> None:
    model = ALL[kind]()
    assert build(lower(model, full_recipe(model, data(model).take(range(16)), base)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_narrow_graphs_build(kind: str, base: str) -> None:
    assert build(lower(ALL[kind](), Recipe(base)))


@pytest.mark.parametrize("kind", ALL)
def test_fp8_builds(kind: str) -> None:
    model = ALL[kind]()
    full = full_recipe(model, data(model).take(range(16)))
    assert build(lower(model, Recipe("fp16", fp8=full.int8, ranges=full.ranges)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("offset", [0, 1])
def test_true_mixes_build(kind: str, offset: int) -> None:
    """Every other quantizable node in INT8, every third node in FP32, FP16 for the rest."""
    model = ALL[kind]()
    full = full_recipe(model, data(model).take(range(16)), "fp16")
    names = [node.name for node in model.graph.node]
    mixed = replace(full, int8=frozenset(sorted(full.int8)[offset::2]), fp32=frozenset(names[offset::3]))
    assert build(lower(model, mixed))


@pytest.mark.parametrize("kind", ALL)
def test_the_form_for_old_tensorrt_builds(kind: str) -> None:
    model = ALL[kind]()
    assert build(lower(model, full_recipe(model, data(model).take(range(16)), "fp16"), "trt8"))


@pytest.mark.parametrize("seed", range(12))
def test_grown_graphs_build(seed: int) -> None:
    grower = Grower(seed)
    for _ in range(7):
        choices = grower.choices()
        grower.grow(choices[int(grower.random.integers(len(choices)))])
    model = grower.finish()
    full = full_recipe(model, {"x": grower.image}, "fp16")
    names = [node.name for node in model.graph.node]
    assert build(lower(model, replace(full, fp32=frozenset(names[seed % 3 :: 3]))))
