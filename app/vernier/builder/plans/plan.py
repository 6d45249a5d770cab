"""Variant → plan: one way for TensorRT 8.5 to 11 and for TensorRT-RTX.

From TensorRT 10 on (and in RTX) the graph's own types decide every precision. Below 10 the same
assignment is an FP32-typed Q/DQ graph, builder flags, and layers pinned to FP32 by the graph's
metadata. What the packages can do is asked of `vernier.engine.trt_runtime.trt_api`, never of a version number here.

Runs in its own process too, so that a crash in a builder cannot end a service:
    python -m vernier.builder.plans.plan request.json out.plan
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from vernier.builder.plans.plan_layers import pin_to_fp32
from vernier.builder.plans.plan_libraries import usable_tactic_sources
from vernier.engine.trt_runtime.trt_api import TrtApi, load_api
from vernier.errors import BuildError, VernierError
from vernier.package.manifest import DimRange
from vernier.package.onnx_metadata import fp32_nodes
from vernier.package.plan_cache import write_whole
from vernier.tensors import TensorSpec

#: (what is being done, share of the whole that is done)
Progress = Callable[[str, float], None]

#: Below TensorRT 10: precision → the builder flags it needs. Nothing for fp32: TF32 is handled apart.
_FLAGS: Dict[str, Tuple[str, ...]] = {
    "fp32": (),
    "tf32": (),
    "fp16": ("FP16",),
    "int8-fp32": ("INT8",),
    "int8": ("INT8", "FP16"),
}

_OTHER_CACHE = (
    "give --timing-cache a file that an earlier build wrote here, or a path where there is no file yet"
)
_PARSING = re.compile(r'While parsing node number (\d+) \[(\w+)(?: -> "([^"]*)")?\]')


@dataclass(frozen=True)
class PlanOptions:
    """What to build.

    Attributes:
        dims: range of every named dimension of the inputs.
        profiles: how many contexts will run at once; matters below TensorRT 10 alone, where each
            context needs an optimization profile of its own.
        compute_capabilities: such as ("8.9", "12.0"); for tensorrt-rtx, which builds for GPUs that
            are not here.
        workspace_bytes: the most scratch memory that a tactic may take; None for TensorRT's default.
        optimization_level: 0 (fast to build) to 5; None for TensorRT's default.
        sparsity: may use 2:4 sparse tactics where weights have that pattern.
        timing_cache: file that is read if it is there and written afterwards.
        own_timing_cache: whether that file is the service's own, replaced where it cannot be used; any other
            file that holds no timings for this version and GPU is refused and left alone.
        detailed: keeps layer details in the plan, for `layer_report`.
    """

    runtime: str
    precision: str = "fp32"
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    profiles: int = 1
    compute_capabilities: Tuple[str, ...] = ()
    workspace_bytes: Optional[int] = None
    optimization_level: Optional[int] = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    sparsity: bool = False
    timing_cache: Optional[Path] = None
    own_timing_cache: bool = False
    detailed: bool = True


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine and what was noticed while it was built."""

    data: bytes
    runtime_version: str
    notes: Tuple[str, ...] = ()


def build_plan(
    model: Union[Path, bytes],
    inputs: Sequence[TensorSpec],
    options: PlanOptions,
    progress: Optional[Progress] = None,
) -> BuiltPlan:
    """Builds the plan of one variant.

    Args:
        model: the ONNX file, or its bytes when all weights are inside.
        inputs: its inputs with their named dimensions.

    Raises:
        BuildError: a sentence with the node's name and operator where the parser refused one, or the timing
            cache is a file of another kind.
        EngineError: the runtime is not installed.
    """
    api = load_api(options.runtime)
    if not api.can_build:
        raise BuildError(f"{api.runtime} only runs plans; build with tensorrt and --version-compatible")
    report = progress or (lambda phase, share: None)
    report("parsing", 0.0)
    api.messages.clear()
    builder = api.module.Builder(api.log)
    if builder is None:
        raise BuildError(f"{api.runtime} {api.version} cannot build here: {api.messages.tail()}")
    network = builder.create_network(api.network_flags())
    _parse(api, network, model)
    config = builder.create_builder_config()
    notes = _configure(api, config, options)
    for _ in range(options.profiles if not api.shares_profile else 1):
        config.add_optimization_profile(_profile(api, builder, network, inputs, options.dims))
    if api.below_10:
        notes += _set_precision(api, config, network, model, options)
    cache = _load_timing_cache(api, config, options)
    monitor = _monitor(api, report)
    if monitor is not None:
        config.progress_monitor = monitor
    report("building", 0.0)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"{api.runtime} {api.version} could not build {options.precision}: {_reason(api)}")
    if cache and options.timing_cache:
        notes += _save_timing_cache(config, options.timing_cache)
    report("building", 1.0)
    return BuiltPlan(bytes(serialized), api.version, tuple(notes))


# --- reading the graph ----------------------------------------------------------------------------
def _parse(api: TrtApi, network: Any, model: Union[Path, bytes]) -> None:
    parser = api.module.OnnxParser(network, api.log)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if not parsed or not network.num_outputs:
        faults = [_parser_sentence(api, parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError(
            f"{api.runtime} {api.version} cannot read the graph: {'; '.join(faults) or 'it is empty'}"
        )


def _parser_sentence(api: TrtApi, error: Any) -> str:
    """The parser's fault with the node's name and operator, which old versions give in their log alone."""
    name = operator = ""
    if hasattr(error, "node_operator"):
        name, operator = error.node_name(), error.node_operator()
    for line in reversed([] if operator else api.messages.lines()):
        found = _PARSING.search(line)
        if found:
            operator, name = found.group(2), found.group(3) or found.group(1)
            break
    words = " ".join(str(error.desc()).split())
    if "Plugin not found" in words or "getPluginCreator" in words:
        words = f"{api.runtime} has no operator '{operator}', nor a plugin of that name"
    return f"node '{name}' ({operator}): {words}" if operator else words


def _reason(api: TrtApi) -> str:
    lines = [" ".join(line.split()) for line in api.messages.lines()[-2:]]
    return "; ".join(lines) or "TensorRT gave no reason"


# --- shapes ---------------------------------------------------------------------------------------
def _profile(
    api: TrtApi, builder: Any, network: Any, inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange]
) -> Any:
    specs = {spec.name: spec for spec in inputs}
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        spec = specs.get(tensor.name)
        if spec is None:
            raise BuildError(f"the graph has an input '{tensor.name}' that the manifest does not name")
        if tensor.is_shape_tensor:
            raise BuildError(
                f"input '{tensor.name}' decides the shape of other tensors, which {api.runtime} engines "
                f"cannot take from a batch; serve this model with onnxruntime"
            )
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *(_sizes(spec, dims, which) for which in ("min", "opt", "max")))
    return profile


def _sizes(spec: TensorSpec, dims: Mapping[str, DimRange], which: str) -> Tuple[int, ...]:
    try:
        return tuple(d if isinstance(d, int) else int(getattr(dims[d], which)) for d in spec.shape)
    except KeyError as error:
        raise BuildError(
            f"input '{spec.name}' needs a range for dimension {error}; give one with --shape"
        ) from None


# --- how to build ---------------------------------------------------------------------------------
def _configure(api: TrtApi, config: Any, options: PlanOptions) -> List[str]:
    """Everything but shapes and precision. Raises BuildError for what this version does not have."""
    notes: List[str] = []
    trt = api.module
    # TF32 is on by default; a variant named fp32 means IEEE single precision.
    (config.set_flag if options.precision == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise BuildError(f"{api.runtime} {api.version} has no builder optimization level (8.6 has)")
        config.builder_optimization_level = options.optimization_level
    if options.sparsity:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.version_compatible:
        # Without the lean runtime inside, the plan holds no host code that a loader would have to trust.
        for name in ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"):
            config.set_flag(_required(api, "BuilderFlag", name, "version-compatible plans (8.6 has)"))
    if options.hardware_compatible:
        config.hardware_compatibility_level = _required(
            api, "HardwareCompatibilityLevel", "AMPERE_PLUS", "hardware-compatible plans (8.6 has)"
        )
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.compute_capabilities:
        _set_capabilities(api, config, options.compute_capabilities)
    sources, note = usable_tactic_sources(api, config.get_tactic_sources())
    if note:
        config.set_tactic_sources(sources)
        notes.append(note)
        independent = api.flag("PreviewFeature", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805")
        if independent is not None:
            config.set_preview_feature(independent, True)
    faster = api.flag("PreviewFeature", "FASTER_DYNAMIC_SHAPES_0805")
    if faster is not None:
        config.set_preview_feature(faster, True)
    return notes


def _required(api: TrtApi, enum: str, name: str, what: str) -> Any:
    member = api.flag(enum, name)
    if member is None:
        raise BuildError(f"{api.runtime} {api.version} has no {what}")
    return member


def _set_capabilities(api: TrtApi, config: Any, capabilities: Sequence[str]) -> None:
    if not hasattr(config, "set_compute_capability"):
        raise BuildError(f"{api.runtime} builds for the GPU at hand only; leave --sm out")
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = "SM" + capability.replace(".", "")
        member = api.flag("ComputeCapability", name)
        if member is None:
            known = [n[2:] for n in api.module.ComputeCapability.__members__ if n.startswith("SM")]
            raise BuildError(
                f"{api.runtime} {api.version} cannot build for GPU architecture {capability}; it knows "
                f"{', '.join(known)}"
            )
        config.set_compute_capability(member, index)


def _set_precision(
    api: TrtApi, config: Any, network: Any, model: Union[Path, bytes], options: PlanOptions
) -> List[str]:
    """Below TensorRT 10: flags allow the narrow types, constraints keep the named nodes in FP32."""
    names = _FLAGS.get(options.precision)
    if names is None:
        raise BuildError(f"{options.precision} needs TensorRT 10 or newer; this is {api.version}")
    for name in names:
        config.set_flag(getattr(api.module.BuilderFlag, name))
    pinned = fp32_nodes(model)
    if not pinned or not names:
        return []
    config.set_flag(api.module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    count = pin_to_fp32(api, network, pinned)
    return [f"{count} layers of {len(pinned)} nodes pinned to FP32"]


# --- timing cache and progress --------------------------------------------------------------------
def _load_timing_cache(api: TrtApi, config: Any, options: PlanOptions) -> bool:
    """Sets the builder's timing cache, an empty one where there is no file yet.

    Raises BuildError for a file that holds no timings for this version and GPU: saving would replace it, and it
    may be the only copy of something. A cache of the service's own is replaced.
    """
    path = options.timing_cache
    if path is None or api.builds_without_gpu:
        return False
    if not options.own_timing_cache and os.path.lexists(path) and not path.is_file():
        raise BuildError(f"{path} is no regular file: {_OTHER_CACHE}")
    try:
        stored = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}; {_OTHER_CACHE}") from error
    empty = config.create_timing_cache(b"")
    cache = config.create_timing_cache(stored) if stored else None
    if cache is not None and _is_taken(cache, stored, empty) and config.set_timing_cache(cache, False):
        return True
    if stored and not options.own_timing_cache:
        raise BuildError(
            f"{path} holds no timings that {api.runtime} {api.version} can use on this GPU, so it is kept: "
            f"{_OTHER_CACHE}"
        )
    return bool(config.set_timing_cache(empty, False))


def _is_taken(cache: Any, stored: bytes, empty: Any) -> bool:
    """Whether `cache` was read from `stored`: for what it cannot read, TensorRT hands out an empty cache."""
    nothing = bytes(empty.serialize())
    if bytes(cache.serialize()) != nothing:
        return True
    # A cache that was saved without timings: as long as an empty one, and it begins like one.
    return len(stored) == len(nothing) and stored[:4] == nothing[:4]


def _save_timing_cache(config: Any, path: Path) -> List[str]:
    """Replaces the file at once or not at all; a note where it cannot be written."""
    try:
        write_whole(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        return [f"the timing cache {path} is not kept: {error.strerror}"]
    return []


def _monitor(api: TrtApi, report: Progress) -> Optional[Any]:
    """TensorRT's nested phases as one share of the whole; None where the version has no monitor."""
    base: Any = getattr(api.module, "IProgressMonitor", None)
    if base is None or not hasattr(api.module.IBuilderConfig, "progress_monitor"):
        return None

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._phases: Dict[str, List[Any]] = {}  # name → [parent, steps, done]
            self._furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]
            report(phase_name, self._share(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases[phase_name][2] = step + 1
            report(phase_name, self._share(phase_name))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _share(self, name: Optional[str]) -> float:
            share = 0.0
            while name in self._phases:
                name, steps, done = self._phases[name]
                share = min((done + share) / steps, 1.0)
            # A parent's step counts as done a moment after its child ended: never step back meanwhile.
            self._furthest = max(self._furthest, share)
            return self._furthest

    return Monitor()


# --- a process of its own -------------------------------------------------------------------------
def run_request(request: Path, out: Path) -> None:
    """Builds what `vernier.engine.plans.plan_source.request_fields` describes. Raises BuildError, EngineError."""
    wanted = json.loads(request.read_text("utf-8"))
    fields = wanted["options"]
    fields["dims"] = {name: DimRange(**sizes) for name, sizes in fields["dims"].items()}
    fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
    fields["timing_cache"] = Path(fields["timing_cache"])
    fields["own_timing_cache"] = True  # in the plan cache, under a name for this version and architecture
    inputs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in wanted["inputs"]]
    out.write_bytes(build_plan(Path(wanted["model"]), inputs, PlanOptions(**fields)).data)


def main(arguments: Sequence[str]) -> int:
    """0, or 2 with one sentence on standard error."""
    try:
        run_request(Path(arguments[0]), Path(arguments[1]))
    except (VernierError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
