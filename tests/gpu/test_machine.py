"""What this machine's TensorRT and driver say of themselves."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.support.executors import Shop
from tests.support.trt_names import missing, used_names
from vernier.builder.plans.plan import PlanOptions, build_plan
from vernier.builder.plans.plan_layers import layer_report
from vernier.engine.cuda import Device
from vernier.engine.nvml import GpuCollector, Nvml
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.errors import BuildError, EngineError

#: Newer than TensorRT 8.5: asked for with hasattr, or by the version switch.
SINCE_8_6 = {
    "IBuilderConfig.builder_optimization_level", "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "IBuilderConfig.progress_monitor", "ParserError.node_name", "ParserError.node_operator",
    "Runtime.engine_host_code_allowed", "ICudaEngine.create_runtime_config", "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize", "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.set_runtime_cache", "ILayer.precision",
    "ILayer.set_output_type",
}  # fmt: skip


def test_the_names_that_the_code_uses_exist_here_or_are_asked_for_first() -> None:
    assert set(missing(load_api("tensorrt").module, used_names())) <= SINCE_8_6


def test_the_device_tells_what_it_is(device: Device) -> None:
    assert device.name
    assert 7.5 <= float(device.compute_capability) < 20
    assert 0 < device.memory_used() < device.memory_bytes


def test_a_gpu_that_is_not_there_is_an_engine_error() -> None:
    from vernier.engine.cuda import open_device

    with pytest.raises(EngineError, match="there is no GPU 99 here"):
        open_device(99)


def test_nvml_reads_utilization_memory_power_and_energy(device: Device) -> None:
    nvml = Nvml([device.pci_bus_id])
    readings = [r for r in nvml.read() if not r.mig]
    assert len(readings) == 1
    reading = readings[0]
    assert reading.name
    assert reading.memory_total_bytes is not None
    assert reading.memory_used_bytes is not None
    assert 0 < reading.memory_used_bytes <= reading.memory_total_bytes
    assert reading.power_watts is None or 0 < reading.power_watts < 5000
    registry = CollectorRegistry()
    registry.register(GpuCollector(nvml))
    text = generate_latest(registry).decode()
    assert f'vernier_gpu_memory_total_bytes{{gpu="{reading.index}"' in text
    assert f'nv_gpu_memory_used_bytes{{gpu_uuid="{reading.uuid}"}}' in text
    nvml.close()


def test_the_inspector_reports_every_layer(shop: Shop) -> None:
    executor = shop.open("mlp", "int8")
    with executor.cuda:
        layers = layer_report(executor.api, executor.engine)
    executor.close()
    assert layers
    assert all(layer.get("Name") for layer in layers)
    assert any("fc0" in str(layer["Name"]) for layer in layers)


def test_what_this_version_cannot_build_is_refused_in_a_sentence(shop: Shop) -> None:
    manifest = shop.manifest("mlp")
    model = shop.package("mlp") / "fp32.onnx"
    if load_api("tensorrt").below_10:
        with pytest.raises(BuildError, match="bf16 needs TensorRT 10 or newer"):
            build_plan(model, manifest.input_specs(), PlanOptions("tensorrt", "bf16", manifest.dims))
    with pytest.raises(BuildError, match="builds for the GPU at hand only"):
        build_plan(model, manifest.input_specs(), PlanOptions("tensorrt", "fp32", manifest.dims, 1, ("8.9",)))
    with pytest.raises(BuildError, match="cannot read the graph"):
        build_plan(b"garbage", manifest.input_specs(), PlanOptions("tensorrt", "fp32", manifest.dims))


def test_a_timing_cache_is_written_and_read_again(
    shop: Shop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = shop.manifest("mlp")
    cache = tmp_path_factory.mktemp("timing") / "t.timing"
    options = PlanOptions("tensorrt", "fp32", manifest.dims, timing_cache=cache)
    model = shop.package("mlp") / "fp32.onnx"
    build_plan(model, manifest.input_specs(), options)
    assert cache.stat().st_size > 100
    again = build_plan(model, manifest.input_specs(), options)
    assert again.data
    for damage in (b"no timing cache", cache.read_bytes()[:-20]):
        cache.write_bytes(damage)
        with pytest.raises(BuildError, match="holds no timings that tensorrt"):
            build_plan(model, manifest.input_specs(), options)
        assert cache.read_bytes() == damage
    own = dataclasses.replace(options, own_timing_cache=True)
    assert build_plan(model, manifest.input_specs(), own).data
    assert cache.read_bytes() != damage
