"""Plans for a whole package while it is built: every variant that the target can run, beside the ONNX files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from vernier.builder.plans.plan import PlanOptions, Progress, build_plan
from vernier.builder.plans.plan_layers import layer_report
from vernier.engine.cuda import open_device
from vernier.engine.trt_runtime.trt_api import TrtApi, load_api
from vernier.errors import BuildError, EngineError
from vernier.package.integrity import sha256_file
from vernier.package.manifest import Manifest, PlanEntry
from vernier.package.plan_cache import plan_entry
from vernier.package.plans import Target, plan_folder, unsupported, variant_files

#: Below TensorRT 10 every slot needs a profile of its own, and a plan must foresee how many there will be:
#: two workers, and what `vernier.engine.plans.plan_manager` keeps in reserve.
PROFILES_BELOW_10 = 4


def add_plans(
    folder: Path, manifest: Manifest, options: PlanOptions, progress: Optional[Progress] = None
) -> Tuple[List[PlanEntry], List[str]]:
    """Builds the plans of every variant of `manifest` into `folder`/plans, on a GPU with a layer report each.

    Args:
        folder: the package, not yet published, with its ONNX files.
        options: `precision` and `dims` are filled in for each variant.

    Returns:
        The entries for `Manifest.plans`, and one sentence for each variant that was left out.

    Raises:
        BuildError, EngineError: no plan can be built here, or one failed to build.
    """
    api = load_api(options.runtime)
    entries: List[PlanEntry] = []
    notes: List[str] = []
    for precision, variant in manifest.variants.items():
        targets, reasons = _targets(api, precision, options.compute_capabilities)
        notes += reasons
        if not targets:
            continue
        model = folder / variant_files(variant, targets[0])[0]
        capabilities = ",".join(target.compute_capability for target in targets)
        wanted = dataclasses.replace(
            options,
            precision=precision,
            dims=manifest.dims,
            profiles=max(options.profiles, PROFILES_BELOW_10 if api.below_10 else 1),
            compute_capabilities=tuple(t.compute_capability for t in targets)
            if api.builds_without_gpu
            else (),
        )
        built = build_plan(model, manifest.input_specs(), wanted, progress)
        notes += built.notes
        shown = "" if options.hardware_compatible else capabilities
        path = f"{plan_folder(api.runtime, api.version, shown)}/{precision}.plan"
        out = folder / path
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(built.data)
        if not api.builds_without_gpu:
            notes += _write_layers(api, built.data, out.with_suffix(".layers.json"))
        compatible = options.version_compatible, options.hardware_compatible
        entry = plan_entry(built.data, precision, targets[0], sha256_file(model), *compatible)
        entries.append(entry.model_copy(update={"path": path, "compute_capability": shown}))
    return entries, notes


def _write_layers(api: TrtApi, plan: bytes, path: Path) -> List[str]:
    """What became of each layer, in the words of TensorRT's inspector, beside the plan; a note if it is silent."""
    try:
        with open_device():
            engine = api.make_runtime().deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineError(api.messages.tail())
            path.write_text(json.dumps(layer_report(api, engine), indent=1), "utf-8")
    except EngineError as error:
        return [f"no layer report: {error.message}"]
    return []


def _targets(api: TrtApi, precision: str, capabilities: Sequence[str]) -> Tuple[List[Target], List[str]]:
    """The GPUs to build for that can run `precision`, and why the others cannot."""
    candidates = [Target(api.runtime, api.version, c, f"sm{c.replace('.', '')}") for c in capabilities]
    if not candidates:
        try:
            device = open_device()
        except EngineError as error:
            raise BuildError(
                f"say for which GPUs to build, such as --sm 89,120: {error.message}"
                if api.builds_without_gpu
                else f"{api.runtime} builds on the GPU that will serve: {error.message}"
            ) from error
        candidates = [Target(api.runtime, api.version, device.compute_capability, device.name)]
    faults = [(target, unsupported(precision, target)) for target in candidates]
    return [t for t, fault in faults if fault is None], [fault for _, fault in faults if fault is not None]


def parse_capabilities(text: str) -> Tuple[str, ...]:
    """`89,12.0` → ("8.9", "12.0"). Raises BuildError."""
    found: List[str] = []
    for part in text.split(","):
        digits = part.strip().replace(".", "")
        if not digits.isdigit() or not 2 <= len(digits) <= 3:
            raise BuildError(f"--sm takes GPU architectures such as 89,120, not '{part.strip()}'")
        found.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(found)
