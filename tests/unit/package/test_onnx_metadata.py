from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.support.packages import mlp_model
from vernier.errors import PackageError
from vernier.package.onnx_metadata import FP32_NODES, fp32_nodes, model_metadata


def with_metadata(**entries: str) -> onnx.ModelProto:
    model = mlp_model()
    onnx.helper.set_model_props(model, entries)
    return model


def test_metadata_is_what_onnx_reads(tmp_path: Path) -> None:
    model = with_metadata(author="someone", note="é " * 200)
    onnx.save(model, tmp_path / "m.onnx")
    expected = {p.key: p.value for p in model.metadata_props}
    assert model_metadata(tmp_path / "m.onnx") == expected
    assert model_metadata(model.SerializeToString()) == expected


def test_nodes_that_must_stay_fp32_are_listed() -> None:
    names = ["/layer/Conv_1", 'odd "name"']
    model = with_metadata(**{FP32_NODES: json.dumps(names)})
    assert fp32_nodes(model.SerializeToString()) == names
    assert fp32_nodes(mlp_model().SerializeToString()) == []


@pytest.mark.parametrize("text", ["first", '{"a": 1}', "[1]"])
def test_a_list_of_nodes_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match="is not a JSON list"):
        fp32_nodes(with_metadata(**{FP32_NODES: text}).SerializeToString())


@pytest.mark.parametrize("damage", [b"\xff" * 40, b"\x0b\x00", b"\x72\x7f\x00"])
def test_what_is_no_onnx_file_is_refused(damage: bytes, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a readable ONNX file"):
        model_metadata(damage)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    data = with_metadata(author="someone").SerializeToString()
    with pytest.raises(PackageError, match="truncated"):
        model_metadata(data[:-3])
    with pytest.raises(PackageError, match="not a readable ONNX file"):
        model_metadata(tmp_path / "missing.onnx")
