"""Reads a Dockerfile into stages of instructions, with its variables filled in.

Knows what this project's Dockerfile uses: continuation lines, comments, ARG before and inside stages, ENV,
JSON and shell forms, flags such as `--from=` and `--mount=`. No escape directive, no here-documents.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction; `text` is what follows its name, before variables are filled in."""

    name: str
    text: str
    line: int


@dataclass
class Stage:
    """One FROM and what follows it. `base` is an image or the name of an earlier stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def read_instructions(path: Path) -> list[Instruction]:
    """Every instruction of the file, continuation lines joined and comment lines dropped."""
    found: list[Instruction] = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not parts):
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            name, _, text = " ".join(parts).strip().partition(" ")
            found.append(Instruction(name.upper(), text.strip(), start))
            parts = []
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """Fills in $NAME, ${NAME} and ${NAME:-default}; unknown names become empty, as in Docker."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name) or match[2] or ""

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)", value, text)


def read_stages(
    path: Path, arguments: dict[str, str] | None = None
) -> tuple[dict[str, Stage], dict[str, str]]:
    """Stages by name, and the values of the ARGs that stand before the first FROM.

    Args:
        arguments: what `--build-arg` would give.
    """
    given = arguments or {}
    outer: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for instruction in read_instructions(path):
        if instruction.name == "FROM":
            words = [word for word in expand(instruction.text, outer).split() if not word.startswith("--")]
            name = words[2] if len(words) == 3 and words[1].upper() == "AS" else str(len(stages))
            current = stages[name] = Stage(name, words[0])
        elif current is not None:
            current.instructions.append(instruction)
        elif instruction.name == "ARG":
            name, _, default = instruction.text.partition("=")
            outer[name] = given.get(name, default)
    return stages, outer


def command(text: str) -> list[str] | str:
    """A list for the JSON form, the text for the shell form."""
    return [str(word) for word in json.loads(text)] if text.startswith("[") else text


def flags(text: str) -> tuple[dict[str, str], str]:
    """Leading `--name=value` flags, and the rest."""
    found: dict[str, str] = {}
    while match := re.match(r"--([\w-]+)(?:=(\S+))?\s+", text):
        found[match[1]] = match[2] or ""
        text = text[match.end() :]
    return found, text


def pairs(text: str) -> dict[str, str]:
    """`A=1 B="two words"` of ENV and LABEL."""
    return {
        match[1]: match[2][1:-1] if match[2].startswith('"') else match[2]
        for match in re.finditer(r'([\w.]+)=("[^"]*"|\S+)', text)
    }
