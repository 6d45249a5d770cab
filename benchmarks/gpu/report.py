"""Results of a run on a GPU as tables; the words around them in benchmarks/GPU.md are written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_TITLES = {
    "resnet50": "ResNet-50 with random weights, images [batch, 3, 224, 224]",
    "ranker": "The recommender example",
    "keywords": "The speech example",
}


def write_page(results: Dict[str, Any], page: Path) -> None:
    """Replaces what lies between the two marks of `page`."""
    before, after = f"# Speed on a GPU\n\n{BEGIN}\n", f"{END}\n"
    if page.is_file() and BEGIN in page.read_text("utf-8"):
        text = page.read_text("utf-8")
        before = text[: text.index(BEGIN)] + BEGIN + "\n"
        after = text[text.index(END) :]
    page.write_text(before + "\n".join(tables(results)) + "\n" + after, "utf-8")


def put_row(rows: List[Dict[str, Any]], row: Dict[str, Any]) -> None:
    """Appends a row, or puts it in the place of the one that measured the same before."""

    def subject(found: Dict[str, Any]) -> List[Any]:
        return [found.get(field) for field in ("network", "precision", "batch", "gpus")]

    for index, old in enumerate(rows):
        if subject(old) == subject(row):
            rows[index] = row
            return
    rows.append(row)


def tables(results: Dict[str, Any]) -> List[str]:
    machine = results["machine"]
    lines = [
        "",
        f"{machine['gpu']} (architecture {machine['compute_capability']}, driver {machine['driver']}), TensorRT "
        f"{machine['tensorrt']}, Python {machine['python']}, {machine['date']}.",
        "",
        "### Goals",
        "",
        *goals(results),
    ]
    for name, title in _TITLES.items():
        rows = [row for row in results["networks"] if row["network"] == name]
        if rows:
            lines += ["", f"### {title}", "", *network_table(rows)]
    if results["small"]:
        lines += ["", "### 64→256→128→1, round trip", "", *small_table(results["small"])]
    lines += ["", "### Slots at batch 64, rows/s", "", *slots_table(results["networks"])]
    if results.get("several"):
        lines += [
            "",
            f"### Several GPUs in one process, ResNet-50, batch 64{_elsewhere(results['several'][0])}",
            "",
        ]
        lines += several_table(results["several"])
    earlier = f" ({results['earlier']})" if results.get("earlier") else ""
    if results.get("waits"):
        lines += [
            "",
            f"### Waiting by interrupt or by spinning, ResNet-50, batch 64{earlier}",
            "",
            *waits_table(results),
        ]
    if results.get("tried"):
        lines += ["", f"### What INT8 needs, ResNet-50, engine alone, one plan for each batch{earlier}", ""]
        lines += _table(
            ["plan", "batch", "images/s"],
            [[row["plan"], str(row["batch"]), f"{row['rows_per_s']:,}"] for row in results["tried"]],
        )
    return [*lines, ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _best(pools: Sequence[Dict[str, float]]) -> Dict[str, float]:
    return max(pools, key=lambda pool: pool["per_s"])


def _rate(row: Dict[str, Any], kind: str) -> str:
    """Rows per second of the best number of slots; a dash where the pool was not measured."""
    if not row.get(kind):
        return "–"
    best = _best(row[kind])
    return f"{best['per_s'] * row['batch']:,.0f} ({best['slots']:.0f})"


def _find(results: Dict[str, Any], network: str, precision: str, batch: int) -> Optional[Dict[str, Any]]:
    for row in results["networks"]:
        if (row["network"], row["precision"], row["batch"]) == (network, precision, batch):
            return dict(row)
    return None


def goals(results: Dict[str, Any]) -> List[str]:
    """One line for each goal that was measured."""
    found: List[Sequence[str]] = []
    fp16, int8 = (_find(results, "resnet50", p, 64) for p in ("fp16", "int8"))
    if fp16 is not None:
        shares = [pool["per_s"] * fp16["raw_in_a_row_s"] for pool in fp16["pool"]]
        enough = [pool["slots"] for pool, share in zip(fp16["pool"], shares) if share >= 0.95]
        told = ", ".join(f"{share:.0%} with {pool['slots']}" for pool, share in zip(fp16["pool"], shares))
        found.append(
            (
                "pool with copies ≥ 95 % of the raw engine, ResNet-50 FP16, batch 64",
                f"{told} slots, of {64 / fp16['raw_in_a_row_s']:,.0f} images/s",
                f"from {min(enough)} slots on" if enough else "no",
            )
        )
    if fp16 is not None and int8 is not None:
        rates = [64 / row["raw_in_a_row_s"] for row in (int8, fp16)]
        found.append(
            (
                "INT8 faster than FP16 at batch 64, beyond 36,400 images/s",
                f"{rates[0]:,.0f} against {rates[1]:,.0f} images/s",
                "yes" if rates[0] > max(rates[1], 36_400) else "no",
            )
        )
    ones = [row for row in results["networks"] if row["batch"] == 1 and "plain" in row]
    if ones:
        gains = sorted(1 - r["slot"]["p50"] / r["plain"]["p50"] for r in ones)
        found.append(
            (
                "graphs at batch 1 no slower than call by call",
                f"{gains[0]:.0%} to {gains[-1]:.0%} less time, over {len(ones)} engines",
                "yes" if gains[0] >= 0 else "no",
            )
        )
    for batch, limit in ((1, 35), (256, 45)):
        small = [r for r in results["small"] if r["batch"] == batch and r["precision"] == "fp32"]
        if small:
            reached = small[0]["default"]["p50"] * 1e6
            found.append(
                (
                    f"64→256→128→1, batch {batch}: upload, run, download and wait ≤ {limit} µs",
                    f"{reached:.1f} µs",
                    "yes" if reached <= limit else "no",
                )
            )
    return _table(["goal", "reached", "met"], found)


def network_table(rows: Sequence[Dict[str, Any]]) -> List[str]:
    head = ["", "batch", "raw engine, rows/s", "one run alone, ms", "one slot p50 / p99, ms",
            "pool, rows/s (slots)", "of raw", "pool p99, ms", "filled, rows/s (slots)", "error"]  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda r: (_ORDER.index(r["precision"]), r["batch"])):
        batch, raw = row["batch"], row["raw_in_a_row_s"]
        best = _best(row["pool"]) if row.get("pool") else None
        lines.append(
            [
                row["precision"].upper(),
                str(batch),
                f"{batch / raw:,.0f}",
                f"{row['raw_alone_s'] * 1e3:.3f}",
                f"{row['slot']['p50'] * 1e3:.3f} / {row['slot']['p99'] * 1e3:.3f}",
                _rate(row, "pool"),
                "–" if best is None else f"{best['per_s'] * raw:.0%}",
                "–" if best is None else f"{best['p99'] * 1e3:.2f}",
                _rate(row, "pool_filled"),
                f"{row['error']['rel_l2']:.1e}",
            ]
        )
    return _table(head, lines)


_ORDER = ("fp32", "tf32", "bf16", "fp16", "int8-fp32", "int8", "fp8")


def slots_table(rows: Sequence[Dict[str, Any]]) -> List[str]:
    head = ["", "raw", "1 slot", "2", "3", "4", "filled: 2", "4", "8"]
    lines = []
    for row in rows:
        if row["batch"] != 64 or len(row.get("pool", ())) < 4:
            continue
        shown = [f"{p['per_s'] * 64:,.0f} (p99 {p['p99'] * 1e3:.1f} ms)" for p in row["pool"]]
        filled = [f"{p['per_s'] * 64:,.0f}" for p in row["pool_filled"]]
        filled += ["–"] * (3 - len(filled))
        lines.append(
            [
                f"{row['network']} {row['precision'].upper()}",
                f"{64 / row['raw_in_a_row_s']:,.0f}",
                *shown,
                *filled,
            ]
        )
    return _table(head, lines)


def _elsewhere(row: Dict[str, Any]) -> str:
    """Where and when a row was measured, if not as the page says at its top."""
    machine = row.get("machine")
    return f" ({machine['gpu']}, {machine['date']})" if machine else ""


def several_table(rows: Sequence[Dict[str, Any]]) -> List[str]:
    """Images per second of one GPU and of several together, by slots on each."""
    lines = []
    for row in rows:
        alone = next(r for r in rows if r["precision"] == row["precision"] and r["gpus"] == 1)
        line = [row["precision"].upper(), str(row["gpus"])]
        for kind in ("pool", "pool_filled"):
            line += [f"{p['per_s'] * row['batch']:,.0f}" for p in row[kind]]
            line.append(f"{_best(row[kind])['per_s'] / _best(alone[kind])['per_s']:.2f}")
        lines.append(line)
    head = [
        "",
        "GPUs",
        "2 slots each",
        "3",
        "4",
        "best, to one GPU's",
        "filled: 2",
        "3",
        "4",
        "best, to one GPU's",
    ]
    return _table(head, lines)


def waits_table(results: Dict[str, Any]) -> List[str]:
    return _table(
        ["", "wait", "slots", "images/s", "p99, ms"],
        [
            [
                precision.upper(),
                how,
                f"{pool['slots']:.0f}",
                f"{pool['per_s'] * 64:,.0f}",
                f"{pool['p99'] * 1e3:.2f}",
            ]
            for precision, how, pool in results["waits"]
        ],
    )


def small_table(rows: Sequence[Dict[str, Any]]) -> List[str]:
    def cell(row: Dict[str, Any], way: str) -> str:
        return f"{row[way]['p50'] * 1e6:.1f} / {row[way]['p99'] * 1e6:.1f}"

    head = [
        "p50 / p99, µs",
        "batch",
        "engine alone",
        "as served",
        "and staged",
        "copied",
        "over the bus",
        "no graph",
    ]
    ways = ("default", "default_filled", "copied", "mapped", "plain")
    return _table(
        head,
        (
            [row["precision"].upper(), str(row["batch"]), f"{row['raw_alone_s'] * 1e6:.1f}"]
            + [cell(row, way) for way in ways]
            for row in rows
        ),
    )
