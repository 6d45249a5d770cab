"""A trained model on disk with the data that belongs to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exhibit:
    """calibration and evaluation go into the build; heldout is seen by neither training nor build."""

    name: str
    title: str
    model: Path
    calibration: Path
    evaluation: Path
    heldout: Path

    def remember(self, folder: Path) -> None:
        text = json.dumps({key: str(value) for key, value in vars(self).items()}, indent=1)
        (folder / f"{self.name}.json").write_text(text + "\n", "utf-8")

    @classmethod
    def recall(cls, name: str, folder: Path) -> Exhibit:
        found = json.loads((folder / f"{name}.json").read_text("utf-8"))
        paths = {key: Path(found[key]) for key in ("model", "calibration", "evaluation", "heldout")}
        return cls(name, found["title"], **paths)
