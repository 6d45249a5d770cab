"""`python -m scripts.dashboards` writes the files; with `--check` it fails when they are not what it would write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scripts.dashboards import gpu, precision, service

OUT = Path(__file__).resolve().parents[2] / "monitoring" / "grafana" / "dashboards"


def rendered() -> dict[str, str]:
    """File name to content."""
    made = {"service": service.dashboard(), "precision": precision.dashboard(), "gpu": gpu.dashboard()}
    return {
        f"{name}.json": json.dumps(board.json(), indent=1, ensure_ascii=False) + "\n"
        for name, board in made.items()
    }


def main() -> None:
    files = rendered()
    if "--check" not in sys.argv:
        OUT.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (OUT / name).write_text(text)
        return
    stale = [
        name for name, text in files.items() if not (OUT / name).exists() or (OUT / name).read_text() != text
    ]
    if stale:
        sys.exit(f"{', '.join(stale)}: not what `python -m scripts.dashboards` writes; run it")


if __name__ == "__main__":
    main()
