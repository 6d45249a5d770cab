"""The command line: `build_engine.py MODEL …` builds, `… inspect` and `… compare` look at what was built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vernier.budget import Budget
from vernier.builder import command
from vernier.builder import compare as comparing
from vernier.builder import inspection as inspecting
from vernier.builder.graphs.shapes import parse_shape
from vernier.builder.pipeline import build as run_build
from vernier.builder.plans.plan import PlanOptions
from vernier.builder.plans.plan_package import parse_capabilities
from vernier.builder.progress import NoProgress, for_people
from vernier.builder.quantizing.modelopt import find_python
from vernier.builder.reports import table
from vernier.builder.request import (
    CALIBRATION_METHODS,
    DEFAULT_LABEL_KEY,
    QUANTIZERS,
    BuildRequest,
    default_precisions,
    parse_pad_values,
    parse_precisions,
    parse_sequence,
)
from vernier.errors import BuildError
from vernier.package.manifest import RUNTIMES

_COMMANDS = ("build", "inspect", "compare")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Builds engine packages from ONNX models, and looks into them. `build` may be left out.",
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
_LabelKey = Annotated[str, typer.Option(help="The array of the evaluation data that holds the labels.")]


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="The ONNX model.", show_default=False)],
    name: Annotated[str, typer.Option(help="The model's name on the server.", show_default=False)],
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, tf32, bf16, fp16, int8-fp32, int8, fp8 in any number, or auto; by default fp32, with data "
            "fp16 too, and with calibration data int8."
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Data for INT8: an .npz, a folder of .npy, or module:function.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Data for the accuracy gate, with labels where there are any."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of all engine packages.")] = Path("engines"),
    budget: Annotated[
        str | None,
        typer.Option(help="What must hold, such as 'auc>=99%' or 'max_abs<=0.05'; joined by commas."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="99.9 % of FP32's accuracy instead of 99 %.")
    ] = False,
    shape: Annotated[
        list[str] | None, typer.Option(help="min:opt:max of an input, such as ids=1x26:64x26:512x26.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="The largest batch.")] = None,
    sequence: Annotated[
        list[str] | None,
        typer.Option(help="Length buckets of a dimension, such as frames=64,128,256, or none."),
    ] = None,
    pad_value: Annotated[
        list[str] | None, typer.Option(help="What an input is padded with instead of 0, such as ids=1.")
    ] = None,
    label_key: _LabelKey = DEFAULT_LABEL_KEY,
    group_key: Annotated[
        str | None,
        typer.Option(
            help="The array of the data that is equal for samples which belong together, such as crops of one photo."
        ),
    ] = None,
    calibration_method: Annotated[
        str | None, typer.Option(help=" | ".join(CALIBRATION_METHODS) + "; best without a cache.")
    ] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(help="Reuse a calibration cache: the ranges of an earlier build, bit for bit."),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many samples.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Where the build keeps the state of its calibration, to go on there when it was interrupted; "
            "removed at the end."
        ),
    ] = None,
    quantizer: Annotated[str, typer.Option(help=" | ".join(QUANTIZERS))] = "vernier",
    search: Annotated[
        bool, typer.Option(help="Give nodes back to higher precision when a variant misses its budget.")
    ] = True,
    plans: Annotated[str | None, typer.Option(help="Build plans too: tensorrt or tensorrt-rtx.")] = None,
    sm: Annotated[
        str | None, typer.Option(help="GPU architectures for tensorrt-rtx plans, such as 89,120.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Plans for tensorrt-lean.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Plans for any GPU from Ampere on.")
    ] = False,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Allow 2:4 sparse tactics.")] = False,
    workspace_mb: Annotated[int | None, typer.Option(min=1, help="Scratch memory of a plan, in MB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="TensorRT's builder level.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="TensorRT's timing cache, read if it is there and written at the end."),
    ] = None,
    below_tensorrt_10: Annotated[
        bool, typer.Option("--below-tensorrt-10", help="Add graphs for TensorRT 8, each as large as FP32.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Builds MODEL in every precision asked for, keeps what its accuracy budget allows, and packs it."""
    wishes = None
    if plans is not None:
        if plans not in RUNTIMES or plans == "onnxruntime":
            raise BuildError(f"--plans takes tensorrt or tensorrt-rtx, not '{plans}'")
        wishes = PlanOptions(
            plans,
            compute_capabilities=parse_capabilities(sm) if sm else (),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            sparsity=sparsity,
            workspace_bytes=None if workspace_mb is None else workspace_mb * 1_000_000,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
        )
    elif sm:
        raise BuildError("--sm names GPUs for plans: add --plans tensorrt-rtx")
    if calibration_method is not None:
        _one_of("--calibration-method", calibration_method, CALIBRATION_METHODS)
    _one_of("--quantizer", quantizer, QUANTIZERS)
    if quantizer == "modelopt":
        find_python()
    if budget is not None:
        Budget.parse(budget)
    request = BuildRequest(
        model=model,
        name=name,
        out=out,
        precisions=default_precisions(calibration, evaluation)
        if precision is None
        else parse_precisions(precision),
        calibration=calibration,
        evaluation=evaluation,
        label_key=label_key,
        group_key=group_key,
        shapes=dict(parse_shape(text) for text in shape or ()),
        max_batch=max_batch,
        sequence=parse_sequence(sequence or ()),
        pad_values=parse_pad_values(pad_value or ()),
        budget=budget,
        strict=strict,
        calibration_method=calibration_method,
        calibration_cache=calibration_cache,
        calibration_samples=calibration_samples,
        resume=resume,
        quantizer=quantizer,
        search=search,
        plans=wishes,
        below_tensorrt_10=below_tensorrt_10,
    )
    outcome = run_build(request, NoProgress() if as_json else for_people())
    if as_json:
        command.print_json(outcome.as_json())
    else:
        table.console().print(table.render(outcome))
    raise typer.Exit(outcome.exit_code)


@app.command()
def inspect(
    package: Annotated[Path, typer.Argument(help="Such as engines/ranker/3.", show_default=False)],
    nodes: Annotated[bool, typer.Option("--nodes", help="The type of every weighted node.")] = False,
    as_json: _Json = False,
) -> None:
    """Verifies PACKAGE and shows what it holds and what was proven about it."""
    if as_json:
        command.print_json(inspecting.describe(package, nodes))
    else:
        table.console().print(inspecting.render(inspecting.describe(package, nodes)))


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help="An ONNX file, a package, or package:variant.", show_default=False)
    ],
    b: Annotated[str, typer.Argument(help="The same; measured against A.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Samples; by default a package's golden vectors.")] = None,
    label_key: _LabelKey = DEFAULT_LABEL_KEY,
    budget: Annotated[str | None, typer.Option(help="End with 1 unless B stays within it.")] = None,
    as_json: _Json = False,
) -> None:
    """Runs A and B on the same data and shows how far B's answers are from A's."""
    result = comparing.compare(
        comparing.find_side(a),
        comparing.find_side(b),
        data,
        label_key,
        Budget.parse(budget) if budget else None,
    )
    if as_json:
        command.print_json(result.as_json())
    else:
        table.console().print(comparing.render(result))
    raise typer.Exit(0 if result.refusal is None else 1)


def _one_of(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise BuildError(f"{option} takes {', '.join(choices)}, not '{value}'")


def main(arguments: Sequence[str] | None = None, program: str = "build_engine.py") -> int:
    """Runs one command.

    Args:
        program: as help and errors name it.

    Returns:
        0 done, 1 refused by the accuracy gate, 2 bad input or a variant that cannot be built, 3 a fault in
        Vernier, 130 interrupted. Errors are said in one sentence on standard error, or as `{"error": …}` on
        standard output with `--json`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in _COMMANDS and given[0] not in ("--help", "-h"):
        given.insert(0, "build")
    return command.run(app, given, program)
