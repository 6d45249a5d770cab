"""Models of any size are written whole and read back as they were."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.unit.builder.models import mlp, old_cnn, run, save, weights
from vernier.builder.graphs.store import input_names, read_model, skeleton, weight_bytes, write_model
from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.request import BuildRequest
from vernier.builder.searching import candidates
from vernier.package.integrity import open_package


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    assert write_model(mlp(), tmp_path / "m.onnx") == [tmp_path / "m.onnx"]
    assert onnx.load(tmp_path / "m.onnx") == mlp()


def test_weights_over_the_limit_go_to_one_file_beside_it(tmp_path: Path) -> None:
    model = mlp(width=2000)
    before = model.SerializeToString(deterministic=True)
    files = write_model(model, tmp_path / "big.onnx", inline_limit_bytes=0)
    assert files == [tmp_path / "big.onnx", tmp_path / "big.onnx.data"]
    assert model.SerializeToString(deterministic=True) == before
    assert files[0].stat().st_size < 2000
    onnx.checker.check_model(str(files[0]), full_check=True)
    x = weights(3, 8, seed=1)
    np.testing.assert_array_equal(run(files[0], {"x": x})[0], run(model, {"x": x})[0])
    again, _ = read_model(files[0])
    assert {t.name: t.raw_data for t in again.graph.initializer} == {
        t.name: t.raw_data for t in model.graph.initializer
    }


def test_a_skeleton_keeps_everything_but_large_weights() -> None:
    model = mlp(width=2000)
    small = skeleton(model)
    assert len(small.SerializeToString()) < 20_000 < weight_bytes(model)
    assert [n.name for n in small.graph.node] == [n.name for n in model.graph.node]
    assert small.opset_import == model.opset_import
    assert small.ir_version == model.ir_version
    stub = next(t for t in small.graph.initializer if t.name == "w1")
    assert (list(stub.dims), stub.data_type) == ([8, 2000], TensorProto.FLOAT)
    assert weight_bytes(model) == 4 * (8 * 2000 + 2000 + 2000)


def test_weights_listed_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    assert input_names(save(old_cnn(), tmp_path / "old.onnx")) == ["x"]


def test_a_package_of_a_large_model_lists_and_verifies_its_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "write_model", functools.partial(write_model, inline_limit_bytes=0))
    data = tmp_path / "d.npz"
    np.savez(data, x=weights(48, 8) * 3)
    request = BuildRequest(
        model=save(mlp(width=2000), tmp_path / "m.onnx"),
        name="big",
        out=tmp_path / "engines",
        precisions=("fp32", "fp16", "int8"),
        calibration=str(data),
        max_batch=2,
    )
    package = build(request, NoProgress()).package
    manifest = open_package(package)
    for precision, variant in manifest.variants.items():
        assert variant.files == [f"{precision}.onnx", f"{precision}.onnx.data"]
    x = weights(3, 8, seed=1)
    np.testing.assert_allclose(
        run(package / "fp32.onnx", {"x": x})[0], run(request.model, {"x": x})[0], atol=1e-6
    )
