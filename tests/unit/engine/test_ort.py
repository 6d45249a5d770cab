"""ONNX Runtime's own ways; what every executor promises is in tests/contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from tests.support.packages import mlp_model, run_reference
from vernier.engine.base import run_once
from vernier.engine.ort import ORT_ERRORS, OnnxRuntimeExecutor, ort_errors
from vernier.errors import EngineError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path)
    return path


def rows(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("optimize", [True, False])
def test_answers_equal_those_of_the_session_itself(model: Path, threads: int, optimize: bool) -> None:
    executor = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=threads, optimize=optimize)
    slots = [executor.open_slot() for _ in range(3)]
    for count in (1, 5, 16, 2, 300):
        expected = run_reference(model, rows(count))
        for slot in slots:
            for name, array in run_once(slot, rows(count)).items():
                np.testing.assert_allclose(array, expected[name], atol=1e-6)
    for slot in slots:
        slot.close()
    executor.close()


def test_outputs_are_not_touched_by_later_runs(model: Path) -> None:
    """Batches are taken apart into views, so a slot that says `fresh_outputs` must mean it."""
    slot = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1).open_slot()
    assert slot.fresh_outputs
    slot.stage({"x": (3, 4)})["x"][...] = rows(3)["x"]
    first = slot.run()
    kept = {name: array.copy() for name, array in first.items()}
    slot.stage({"x": (3, 4)})["x"][...] = 7.0
    slot.run()
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])


def test_inputs_that_are_read_in_place_are_left_as_they_are(tmp_path: Path) -> None:
    """Element-wise operators work in place inside a session; never in the memory of an input."""
    path = tmp_path / "elementwise.onnx"
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    nodes = [helper.make_node("Relu", ["x"], ["positive"]), helper.make_node("Neg", ["positive"], ["y"])]
    graph = helper.make_graph(nodes, "elementwise", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    slot = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1).open_slot()
    inputs, kept = rows(5000), rows(5000)["x"]
    slot.read_in_place(inputs)
    results = slot.run()
    np.testing.assert_array_equal(inputs["x"], kept)
    np.testing.assert_array_equal(results["y"], -np.maximum(kept, 0))


def test_an_output_that_is_an_input_is_not_the_staging_memory(tmp_path: Path) -> None:
    path = tmp_path / "identity.onnx"
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    slot = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1).open_slot()
    view = slot.stage({"x": (2, 4)})["x"]
    view[...] = 1.0
    output = slot.run()["y"]
    view[...] = 2.0
    np.testing.assert_array_equal(output, 1.0)


def test_growing_and_shrinking_batches_share_memory_that_grows_by_doubling(model: Path) -> None:
    slot = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1).open_slot()
    for count in (1, 2, 64, 3, 64, 65, 1):
        assert slot.stage({"x": (count, 4)})["x"].shape == (count, 4)
        np.testing.assert_allclose(
            run_once(slot, rows(count))["y"], run_reference(model, rows(count))["y"], atol=1e-6
        )


@pytest.mark.parametrize(
    "shapes",
    [{"x": (2, 5)}, {"x": (2,)}, {"x": (2, 4, 1)}, {"other": (2, 4)}, {}, {"x": (2, 4), "y": (2, 4)}],
)
def test_shapes_that_the_variant_does_not_take_are_refused(
    model: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    slot = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1).open_slot()
    with pytest.raises(EngineError):
        slot.stage(shapes)


def test_running_before_staging_is_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="stage"):
        OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1).open_slot().run()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_what_is_no_model_is_an_engine_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1)


def test_data_that_fails_inside_the_graph_is_an_engine_error(tmp_path: Path) -> None:
    path = tmp_path / "gather.onnx"
    table = helper.make_tensor("table", TensorProto.FLOAT, [3, 1], [0.0, 1.0, 2.0])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    graph = helper.make_graph([node], "look-up", [ids], [out], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    slot = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1).open_slot()
    slot.stage({"ids": (1,)})["ids"][...] = 99
    with pytest.raises(EngineError, match="failed to run"):
        slot.run()
    slot.stage({"ids": (1,)})["ids"][...] = 2
    assert slot.run()["y"][0, 0] == 2.0


@pytest.mark.parametrize("error", ORT_ERRORS, ids=lambda e: e.__name__)
def test_every_error_of_onnx_runtime_becomes_ours(error: type[Exception]) -> None:
    with pytest.raises(EngineError, match="to be tested"), ort_errors("to be tested"):
        raise error("something\nlong")


def test_the_list_of_its_errors_is_complete() -> None:
    known = [t for t in vars(ort_state).values() if isinstance(t, type) and issubclass(t, Exception)]
    assert len(known) > 10
    assert set(known) <= set(ORT_ERRORS)


def test_a_slot_per_session_where_sessions_have_threads_and_closed_ones_are_used_again(model: Path) -> None:
    executor = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=2)
    first, second = executor.open_slot(), executor.open_slot()
    assert first._session is not second._session
    session = first._session
    first.close()
    first.close()
    assert executor.open_slot()._session is session
    shared = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1)
    assert shared.open_slot()._session is shared.open_slot()._session


def test_no_slot_after_close(model: Path) -> None:
    executor = OnnxRuntimeExecutor(model, precision="fp32", intra_op_threads=1)
    executor.close()
    executor.close()
    with pytest.raises(EngineError, match="closed"):
        executor.open_slot()


def test_engine_bytes_count_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    executor = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1)
    assert executor.engine_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert executor.load_seconds > 0
