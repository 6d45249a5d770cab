"""One JSON object for each event, with the same names of fields whoever has logged it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def logged(statement: str) -> dict[str, Any]:
    """What a fresh process logs by `statement`."""
    code = f"import logging; from vernier.logs import configure_logging; configure_logging('json', 'info'); {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stderr)
    return record


def test_a_line_has_time_level_logger_message_and_what_was_given() -> None:
    record = logged("logging.getLogger('vernier').info('loaded', extra={'model': 'ranker'})")
    assert list(record) == ["time", "level", "logger", "message", "model"]


def test_the_message_for_terminals_of_uvicorn_is_left_out() -> None:
    extra = "extra={'color_message': 'Finished \\\\x1b[36m%d'}"
    record = logged(f"logging.getLogger('uvicorn.error').info('Finished server process [%d]', 7, {extra})")
    assert record["message"] == "Finished server process [7]"
    assert list(record) == ["time", "level", "logger", "message"]
