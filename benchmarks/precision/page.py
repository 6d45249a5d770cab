"""Renders benchmarks/PRECISION.md from the results folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import processor
from benchmarks.precision import resnet50
from benchmarks.precision.measure import BASELINE, EMULATED, Judged, Row, from_json
from benchmarks.precision.memory import Peak, recall
from benchmarks.precision.traps import HELD_OUT, Sprung, read_traps

_ORDER = ("residual", "separable", "transformer", "lstm", "recommender", "speech")
_PRECISIONS = ("bf16", "fp16", "int8-fp32", "int8")
#: The file in the results folder with the peaks of memory.
MEMORY = "memory.json"
_GOAL_SIZE = 0.3
_GOAL_BYTES = 4e9
_SMALLER_IS_BETTER = ("rmse", "log_loss", "wer", "cer")


def render(results: Path) -> str:
    """The page; what was not measured is left out."""
    rows = [
        from_json(path.read_text("utf-8"))
        for name in _ORDER
        for how in ("ordinary", "strict")
        if (path := results / f"{name}-{how}.json").exists()
    ]
    parts = [_introduction(_measured_on(results)), _accuracy(rows), _every_variant(rows)]
    if (path := results / "traps.json").exists():
        parts.append(_traps(read_traps(path.read_text("utf-8"))))
    if (path := results / "resnet50-ordinary.json").exists():
        parts.append(_resnet50(from_json(path.read_text("utf-8"))))
    if peaks := recall(results / MEMORY):
        parts.append(_memory(peaks))
    parts.append(_missing(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _missing(results: Path) -> str:
    """Names what this page cannot speak of, so that nobody takes it for measured."""
    wanted = [f"{name}-{how}" for name in _ORDER for how in ("ordinary", "strict")]
    wanted += ["traps", "resnet50-ordinary", "memory"]
    missing = [name for name in wanted if not (results / f"{name}.json").exists()]
    return f"Not measured with this state of the code: {', '.join(missing)}." if missing else ""


def _measured_on(results: Path) -> str:
    """The day, or the days, on which the results were written."""
    days = sorted({date.fromtimestamp(path.stat().st_mtime).isoformat() for path in results.glob("*.json")})
    return " to ".join(dict.fromkeys(days[:1] + days[-1:]))


def _machine() -> str:
    return f"{os.cpu_count()} cores of a shared virtual machine ({processor()})"


def _introduction(when: str) -> str:
    tools = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnxruntime", "numpy"))
    return f"""# Precision, measured

`python -m benchmarks.precision` writes this page. It trains four small networks on synthetic tasks, takes
the two examples, builds each with `--precision auto` at the default budget (99 % of FP32's task metric, and
the sanity bound on single answers) and at `--strict` (99.9 %), and judges the results on **held-out data**
that neither training, nor calibration, nor the build's own evaluation has seen. “{EMULATED}” means that
the rounding of FP16 and BF16 and every Q/DQ pair are computed as the graph says, without ONNX Runtime's own
fusions. Beside it stands what a converter without a gate makes: every node in INT8, ranges by min-max,
weights to the nearest.

Measured {when} on {_machine()}, Python {platform.python_version()}, {tools}. Times depend on the machine, and so does
what ONNX Runtime answers in INT8: its kernels differ from one CPU to another. The machine had other work meanwhile, so
times are upper bounds."""


def _accuracy(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        "## INT8 inside the budget, on held-out data",
        "",
        "| model | budget | metric | FP32 | INT8 | of FP32 | inside | min-max everything | inside | nodes in INT8 "
        "| of the MACs | size | search | build |",
        "|---|---|---|---:|---:|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        naive = _find(row, BASELINE, EMULATED)
        int8 = _find(row, "int8", EMULATED)
        assert naive is not None
        shown = int8 or naive
        lines.append(
            "| "
            + " | ".join(
                [
                    row.title,
                    "99.9 %" if row.strict else "99 %",
                    shown.metric.split("@")[0],
                    f"{shown.reference:.5f}",
                    f"{int8.value:.5f}" if int8 else "refused",
                    _share(int8) if int8 else "",
                    _inside(int8) if int8 else "",
                    f"{naive.value:.5f} ({_share(naive)})",
                    _inside(naive),
                    f"{row.int8_nodes} of {row.weighted_nodes}",
                    f"{row.kept_macs:.0%}",
                    f"{row.bytes_int8 / row.bytes_fp32:.0%}" if row.bytes_int8 else "–",
                    f"{row.search_seconds:.0f} s",
                    f"{row.build_seconds:.0f} s",
                ]
            )
            + " |"
        )
    plans = sum(row.plans for row in rows)
    lines += [
        "",
        f"`inside` counts every term, the bounds on single answers included. `search` and `build` are for all variants "
        f"of the build together (up to seven). {plans} plans of these variants were parsed and built by TensorRT for "
        f"RTX as strongly typed networks, on a machine without a GPU.",
    ]
    if small := [row for row in rows if row.bytes_int8 and not row.strict]:
        under = [row.title for row in small if row.bytes_int8 < _GOAL_SIZE * row.bytes_fp32]
        over = [row.title for row in small if row.title not in under]
        lines += [
            "",
            f"Of models whose weights outweigh the rest of the file INT8 should take under {_GOAL_SIZE:.0%} of FP32's "
            f"size. At 99 % that holds for: {', '.join(under) or 'none'}; not for: {', '.join(over) or 'none'}. What "
            "is not in INT8, or never is (embeddings, biases, scales, the graph itself), keeps its size.",
        ]
    if strict := [row for row in rows if row.strict]:
        kept, some = [row.kept_macs for row in strict], min(row.evaluated for row in strict)
        lines += [
            "",
            f"At 99.9 % {min(kept):.0%} to {max(kept):.0%} of the MACs stay in INT8; where none does, INT8 is "
            f"refused and another variant serves. The doubt of a finite number of samples counts as lost "
            f"(docs/precision.md), and the more the fewer there are: 0.1 % of {some:,} evaluation samples are "
            f"{0.001 * some:.1f}.",
        ]
    return "\n".join(lines)


def _every_variant(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    judged = [(row, entry) for row in rows for entry in row.judged if entry.precision != BASELINE]
    outside = [(row, entry) for row, entry in judged if not entry.inside]
    served = [
        (row, entry) for row, entry in judged if entry.precision == row.chosen and entry.how != EMULATED
    ]
    lines = [
        "## Every published variant, on held-out data",
        "",
        f"Of {len(judged)} judgements of published variants (as a GPU computes them, and as ONNX Runtime serves them), "
        f"{len(judged) - len(outside)} are inside their budget on held-out data. What `auto` chose to serve is inside "
        f"in {sum(entry.inside for _, entry in served)} of {len(served)} builds.",
        "",
        "| model | budget | served | variants and the worst single answer (`rel_spread`) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{entry.precision} {entry.worst:.3g}{'' if entry.inside else ' **outside**'}"
            for entry in row.judged
            if entry.how == EMULATED and entry.precision != BASELINE
        ]
        refused = [
            name for name, status in row.statuses.items() if status == "refused" and name not in str(cells)
        ]
        if refused:
            cells.append(f"refused: {', '.join(refused)}")
        lines.append(
            f"| {row.title} | {'99.9 %' if row.strict else '99 %'} | {row.chosen} | {'; '.join(cells)} |"
        )
    if outside:
        lines += ["", "Outside:", ""]
        lines += [f"- {row.title}, {entry.precision}, {entry.how}: {entry.reason}" for row, entry in outside]
    return "\n".join(lines)


def _traps(found: Sequence[Sprung]) -> str:
    names = list(dict.fromkeys((entry.trap, entry.what) for entry in found))
    passed = [entry for entry in found if entry.used is not None]
    wrong = [entry for entry in passed if not entry.sane]
    outside = [entry for entry in passed if entry.used is not None and entry.used > 1]
    lines = [
        "## Models built to break",
        "",
        f"Each cell: refused by the gate, or the types of the weighted nodes and the part of the budget that the "
        f"worst of {HELD_OUT:,} held-out samples uses up. Of {len(passed)} variants that passed their gate "
        f"{len(wrong)} give an answer that is another answer; {len(outside)} stray beyond the budget in some sample.",
        "",
        "| model | what breaks it | " + " | ".join(_PRECISIONS) + " |",
        "|---|---|" + "---|" * len(_PRECISIONS),
    ]
    for name, what in names:
        cells = []
        for precision in _PRECISIONS:
            entry = next((e for e in found if e.trap == name and e.precision == precision), None)
            if entry is None or entry.status != "pass":
                cells.append(entry.status if entry else "–")
                continue
            types = ", ".join(f"{count} {kind}" for kind, count in entry.assignment.items())
            cells.append(f"{types}: {entry.used:.0%}{'' if entry.sane else ' **wrong**'}")
        lines.append(f"| {name} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _resnet50(row: Row) -> str:
    int8 = "published" if row.bytes_int8 else "refused"
    size = f"{row.bytes_int8 / row.bytes_fp32:.1%} of FP32's" if row.bytes_int8 else "not in the package"
    phases = "; ".join(f"{title} {seconds:.0f} s" for title, seconds in row.phases.items() if seconds >= 1)
    return f"""## A model of ResNet-50's size

Random weights, {row.evaluated} pictures for calibration and as many for the gate; FP32, FP16 and INT8 built,
judged by the default budget without labels, and timed: **{row.build_seconds:.0f} s** in all,
{row.search_seconds:.0f} s of them spent searching, with at most {row.peak_mb:.0f} MB of memory. INT8 was {int8}:
{row.int8_nodes} of {row.weighted_nodes} weighted nodes ({row.kept_macs:.0%} of the MACs), file size {size}.

Steps: {phases or "not recorded"}."""


def _memory(peaks: Sequence[Peak]) -> str:
    fewest, most = peaks[0], peaks[-1]
    goal = "under" if most.peak_bytes < _GOAL_BYTES else "**over**"
    lines = [
        "## Memory, whatever the number of samples",
        "",
        f"`python -m benchmarks.precision --memory {' '.join(str(p.samples) for p in peaks)}` builds FP32 and INT8 "
        f"of the same model from one mapped file of pictures, without a search. The largest resident set of the whole "
        f"build with {most.samples:,} samples is {goal} the goal of {_GOAL_BYTES / 1e9:.0f} GB, and "
        f"{most.peak_bytes / fewest.peak_bytes:.2f} times that with {fewest.samples:,}.",
        "",
        "| calibration samples | their size | largest resident set |",
        "|---:|---:|---:|",
    ]
    for peak in peaks:
        size = peak.samples * resnet50.SAMPLE_BYTES / 1e9
        lines.append(f"| {peak.samples:,} | {size:.1f} GB | {peak.peak_bytes / 1e9:.2f} GB |")
    return "\n".join(lines)


def _find(row: Row, precision: str, how: str) -> Judged | None:
    return next((entry for entry in row.judged if entry.precision == precision and entry.how == how), None)


def _share(entry: Judged) -> str:
    if not entry.reference:
        return ""
    metric = entry.metric.split("@")[0]
    share = (
        2 - entry.value / entry.reference if metric in _SMALLER_IS_BETTER else entry.value / entry.reference
    )
    return f"{share:.2%}"


def _inside(entry: Judged) -> str:
    return "yes" if entry.inside else "**no**"
