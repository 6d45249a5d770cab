"""The names that the code takes of TensorRT exist on the real classes; where they do not, a version switch says so."""

from __future__ import annotations

import pytest

from tests.support.trt_names import missing, module_names, used_names
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.errors import EngineError

#: What TensorRT-RTX (and full TensorRT from 11 on) dropped: used below TensorRT 10 alone.
ONLY_BELOW_10 = {"ILayer.precision", "ILayer.set_output_type"}
#: Classes that only a package that builds has.
BUILD_CLASSES = {
    "Builder", "IBuilderConfig", "ILayer", "INetworkDefinition", "ITensor", "ITimingCache", "OnnxParser", "ParserError",
}  # fmt: skip
#: Classes and names that only TensorRT-RTX has, behind a look for CudaGraphStrategy.
RTX_ONLY = {
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.set_runtime_cache",
}


def test_the_code_was_read_for_names_and_some_were_found() -> None:
    names = used_names()
    assert {
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("IBuilderConfig", "set_compute_capability"),
        ("OnnxParser", "parse_from_file"),
    } <= names


def test_every_name_exists_in_tensorrt_rtx_but_for_those_used_below_10() -> None:
    api = load_api("tensorrt-rtx")
    assert set(missing(api.module, used_names())) == ONLY_BELOW_10
    assert [name for name in module_names() if not hasattr(api.module, name)] == []


def test_every_name_of_the_running_side_exists_in_tensorrt_lean() -> None:
    api = load_api("tensorrt-lean")
    running = {(c, n) for c, n in used_names() if c not in BUILD_CLASSES}
    assert set(missing(api.module, running)) == RTX_ONLY


@pytest.mark.parametrize(
    ("runtime", "builds", "without_gpu"),
    [("tensorrt-rtx", True, True), ("tensorrt-lean", False, False)],
)
def test_what_each_package_can_do_is_asked_of_the_package(
    runtime: str, builds: bool, without_gpu: bool
) -> None:
    api = load_api(runtime)
    assert api.can_build is builds
    assert api.builds_without_gpu is without_gpu
    assert api.form == "strong"
    assert not api.below_10
    assert api.shares_profile


def test_tf32_and_strong_typing_are_flags_that_the_builders_have() -> None:
    api = load_api("tensorrt-rtx")
    assert api.flag("BuilderFlag", "TF32") is not None
    assert api.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") is not None
    # Precision flags and explicit batch are gone: the code may set them below 10 alone.
    assert api.flag("BuilderFlag", "FP16") is None
    assert api.flag("BuilderFlag", "INT8") is None
    assert api.flag("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH") is None
    assert api.network_flags() == 1 << int(api.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_types_that_cannot_be_served_are_refused_by_name() -> None:
    api = load_api("tensorrt-rtx")
    assert api.dtype_name(api.module.DataType.HALF) == "float16"
    assert api.plan_dtype("int64") == "int64"
    with pytest.raises(EngineError, match="type FP4 cannot be served"):
        api.dtype_name(api.module.DataType.FP4)


def test_a_runtime_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(EngineError, match="install tensorrt"):
        load_api("tensorrt")
    with pytest.raises(EngineError, match="runtime must be one of"):
        load_api("onnxruntime")


def test_a_runtime_never_runs_host_code_out_of_a_plan() -> None:
    assert load_api("tensorrt-rtx").make_runtime().engine_host_code_allowed is False
