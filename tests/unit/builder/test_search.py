"""A search gives back what does the harm, little else, and only what fresh samples confirm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.unit.builder.models import make_model, save, weights
from vernier.budget import Budget
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.prepare import PreparedModel, prepare
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.placement import QuantizableNode, quantizable_nodes
from vernier.builder.progress import NoProgress
from vernier.builder.quantizing.calibrate import calibrate
from vernier.builder.quantizing.weights import quantize_weights
from vernier.builder.samples.data import ArraySamples, Samples
from vernier.builder.searching.gate import gate
from vernier.builder.searching.search import SearchResult, search
from vernier.builder.searching.units import float_units, quantized_units, without
from vernier.errors import BuildError

LAYERS, WIDTH = 12, 24
#: These layers read one channel a thousand times as large as the others: its range leaves nothing for them.
HARMFUL = (3, 8)


def samples(count: int, seed: int, scale: float = 1.0) -> ArraySamples:
    x = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32) * np.float32(scale)
    return ArraySamples({"x": x})


def deep(
    folder: Path, harmful: tuple[int, ...] = HARMFUL, widths: dict[int, int] | None = None
) -> PreparedModel:
    """x → (MatMul, Tanh) twelve times → y; `widths` are those between layers, 24 unless it says more."""
    node, nodes, constants, value = helper.make_node, [], {}, "x"
    sizes = [WIDTH, *(WIDTH if widths is None else widths.get(i, WIDTH) for i in range(1, LAYERS)), 6]
    for i in range(LAYERS):
        weight = weights(sizes[i], sizes[i + 1], seed=i) * (12 / math.sqrt(sizes[i]) / 2)
        if i in harmful:
            stretch = np.ones(sizes[i], np.float32)
            stretch[0] = 1000
            constants[f"s{i}"] = stretch
            nodes.append(node("Mul", [value, f"s{i}"], [f"m{i}"], name=f"stretch{i}"))
            value, weight = f"m{i}", weight / stretch[:, None]
        constants[f"w{i}"] = weight.astype(np.float32)
        last = i == LAYERS - 1
        nodes.append(node("MatMul", [value, f"w{i}"], ["y" if last else f"h{i}"], name=f"layer{i}"))
        if not last:
            nodes.append(node("Tanh", [f"h{i}"], [f"t{i}"], name=f"tanh{i}"))
            value = f"t{i}"
    model = make_model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", WIDTH])},
        {"y": (TensorProto.FLOAT, ["batch", 6])},
        constants,
    )
    return prepare(save(model, folder / "deep.onnx"), {}, folder)


def labelled(prepared: PreparedModel, count: int, seed: int) -> ArraySamples:
    """Samples whose labels are FP32's own decisions."""
    made = samples(count, seed)
    made.labels = run_model(prepared.model, made)["y"].argmax(axis=1)
    return made


def everything(prepared: PreparedModel, base: str = "fp16") -> tuple[Recipe, list[QuantizableNode]]:
    nodes = quantizable_nodes(prepared.model)
    seen = samples(64, 0)
    ranges = calibrate(prepared.model, nodes, seen, "minmax").scales
    rounded = quantize_weights(prepared.model, nodes, None, "nearest", ranges=ranges)
    return Recipe(base, int8=frozenset(n.name for n in nodes), ranges=ranges, weights=rounded), nodes


def found(
    prepared: PreparedModel, budget: str, base: str = "fp16", verify: Samples | None = None
) -> tuple[SearchResult, Recipe]:
    recipe, nodes = everything(prepared, base)
    result = search(
        prepared, recipe, nodes, samples(96, 1), verify or samples(200, 2), Budget.parse(budget), NoProgress()
    )
    return result, recipe


def holds(prepared: PreparedModel, recipe: Recipe, budget: str) -> bool:
    fresh = samples(500, 3)
    reference, candidate = (run_model(m, fresh) for m in (prepared.model, lower(prepared.model, recipe)))
    return gate(reference, candidate, None, Budget.parse(budget)).passed


def test_nothing_is_given_back_when_the_budget_holds(tmp_path: Path) -> None:
    prepared = deep(tmp_path, harmful=())
    result, recipe = found(prepared, "rel_spread.max<=0.9")
    assert result.passed
    assert result.recipe == recipe
    assert result.given_back == ()
    assert result.kept_macs == 1
    assert [step.samples for step in result.evaluations] == ["select", "verify"]
    assert result.sensitivities == {}


def test_the_harmful_nodes_are_given_back_and_the_others_stay(tmp_path: Path) -> None:
    prepared = deep(tmp_path)
    budget = "rel_spread.max<=0.3"
    result, recipe = found(prepared, budget)
    harmful = {f"layer{i}" for i in HARMFUL}
    assert not holds(prepared, recipe, budget)
    assert result.passed
    assert harmful <= set(result.given_back)
    assert len(result.given_back) <= 4
    assert result.recipe.int8 == recipe.int8 - set(result.given_back)
    assert holds(prepared, result.recipe, budget)
    assert set(sorted(result.sensitivities, key=lambda n: -result.sensitivities[n])[:2]) == harmful
    assert result.kept_macs == pytest.approx(1 - len(result.given_back) / LAYERS, abs=0.06)


def test_it_takes_about_the_logarithm_of_the_nodes_in_evaluations(tmp_path: Path) -> None:
    result, _ = found(deep(tmp_path), "rel_spread.max<=0.25")
    # All, none, and one bisection for each of two orders, for each time that verification fails.
    once = 2 + 2 * math.ceil(math.log2(LAYERS)) + 1
    rounds = sum(step.samples == "verify" for step in result.evaluations)
    assert len(result.evaluations) <= once * rounds


def test_of_equally_harmful_nodes_the_cheaper_is_given_back(tmp_path: Path) -> None:
    # Layer 8 reads 192 channels: quantizing it saves eight times as much as quantizing layer 3.
    prepared = deep(tmp_path, widths={8: 8 * WIDTH})
    recipe, nodes = everything(prepared)
    units = {unit.nodes[0]: unit for unit in quantized_units(prepared.model, nodes, recipe)}
    assert units["layer8"].saving > 4 * units["layer3"].saving
    assert sum(unit.saving for unit in units.values()) == pytest.approx(1)


def test_a_base_type_that_strays_too_far_is_mended_first(tmp_path: Path) -> None:
    prepared = deep(tmp_path, harmful=())
    budget = "rel_spread.max<=0.0002"
    result, _ = found(prepared, budget)
    assert result.passed
    assert result.recipe.base == "fp16"
    assert result.recipe.fp32
    assert not result.recipe.int8
    assert holds(prepared, result.recipe, budget)


def test_an_fp16_variant_is_searched_in_the_same_way(tmp_path: Path) -> None:
    prepared = deep(tmp_path, harmful=())
    budget = Budget.parse("rel_spread.max<=0.003")
    nodes = quantizable_nodes(prepared.model)
    result = search(prepared, Recipe("fp16"), nodes, samples(96, 1), samples(200, 2), budget, NoProgress())
    units = float_units(prepared.model, nodes, Recipe("fp16"))
    assert result.passed
    assert 0 < len(result.recipe.fp32) < sum(len(unit.nodes) for unit in units)
    assert holds(prepared, result.recipe, budget.texts[0])


def test_a_failed_verification_gives_back_nodes_and_does_not_mend_what_the_base_type_spends(
    tmp_path: Path,
) -> None:
    # Five answers of a thousand may be lost: FP16's own doubt is half of that, and the slack for another
    # selection must not become less than that.
    prepared = deep(tmp_path, harmful=())
    recipe, nodes = everything(prepared)
    select, verify = labelled(prepared, 1000, 1), labelled(prepared, 1000, 2)
    result = search(prepared, recipe, nodes, select, verify, Budget.parse("accuracy>=99.5%"), NoProgress())
    verified = [step for step in result.evaluations if step.samples == "verify"]
    assert verified[0].used > 1
    assert [step.given_back for step in verified] == sorted(step.given_back for step in verified)
    assert result.passed
    assert not result.recipe.fp32


def test_what_was_given_back_and_fits_after_all_is_taken_back(tmp_path: Path) -> None:
    # An evaluation of three fewer nodes looked worse than it is, by chance.
    prepared = deep(tmp_path, harmful=())
    budget = "rel_spread.max<=0.3"
    result, _ = found(prepared, budget)
    verified = [step.given_back for step in result.evaluations if step.samples == "verify"]
    assert verified[-1] < verified[0]
    assert len(result.given_back) == verified[-1]
    assert holds(prepared, result.recipe, budget)


def test_what_another_search_kept_is_tried_too(tmp_path: Path) -> None:
    prepared = deep(tmp_path, harmful=())
    recipe, nodes = everything(prepared)
    select, verify, budget = samples(96, 11), samples(200, 12), Budget.parse("rel_spread.max<=0.3")
    alone = search(prepared, recipe, nodes, select, verify, budget, NoProgress())
    wider, _ = everything(prepared, "fp32")
    before = search(prepared, wider, nodes, select, verify, budget, NoProgress())
    after = search(prepared, recipe, nodes, select, verify, budget, NoProgress(), kept=before.recipe.int8)
    assert alone.kept_macs < before.kept_macs
    assert after.passed
    assert after.recipe.int8 == before.recipe.int8


def test_the_answers_of_what_was_verified_are_at_hand(tmp_path: Path) -> None:
    prepared = deep(tmp_path)
    recipe, nodes = everything(prepared)
    select, verify = samples(96, 1), samples(200, 2)
    result = search(
        prepared, recipe, nodes, select, verify, Budget.parse("rel_spread.max<=0.3"), NoProgress()
    )
    assert [part for part, _ in result.verified] == [verify, select]
    for part, answers in result.verified:
        np.testing.assert_array_equal(
            answers["y"], run_model(lower(prepared.model, result.recipe), part)["y"]
        )


def test_a_budget_that_fp32_itself_misses_stops_the_search(tmp_path: Path) -> None:
    prepared = deep(tmp_path, harmful=())
    recipe, nodes = everything(prepared)
    labelled = samples(96, 1)
    labelled.labels = np.random.default_rng(0).integers(0, 6, 96)
    with pytest.raises(BuildError, match="FP32 itself misses"):
        search(prepared, recipe, nodes, labelled, labelled, Budget.parse("accuracy>=0.99"), NoProgress())


def test_what_fresh_samples_refute_is_not_called_passed(tmp_path: Path) -> None:
    # Far outside of the calibrated ranges everything clips, which the selection cannot know.
    prepared = deep(tmp_path, harmful=())
    result, _ = found(prepared, "rel_spread.max<=0.6", verify=samples(100, 4, scale=30.0))
    verified = [step for step in result.evaluations if step.samples == "verify"]
    assert verified[0].used > 1
    assert len(verified) > 1
    assert result.passed == any(step.used <= 1 for step in verified)
    if result.passed:
        assert "layer0" not in result.recipe.int8


def test_giving_back_names_the_nodes_in_their_type(tmp_path: Path) -> None:
    prepared = deep(tmp_path)
    recipe, nodes = everything(prepared)
    quantized = quantized_units(prepared.model, nodes, recipe)
    floats = float_units(prepared.model, nodes, recipe)
    assert without(recipe, quantized).int8 == frozenset()
    assert without(recipe, floats).fp32 >= {n for u in floats for n in u.nodes}
    assert without(recipe, ()) == recipe
    assert float_units(prepared.model, nodes, replace(recipe, base="fp32")) == ()
