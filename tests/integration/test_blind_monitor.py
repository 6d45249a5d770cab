"""The precision monitor's thread dies in a real service, and a real Prometheus rings for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.load import Load
from tests.support.packages import mlp_model, write_package
from tests.support.prometheus import prometheus
from tests.support.server import serve

ALERT = "VernierPrecisionMonitorBlind"


def hastened(rule: dict[str, Any]) -> dict[str, Any]:
    """The alert as it is shipped, with seconds for minutes."""
    if rule.get("alert") != ALERT:
        return rule
    assert rule["expr"].count("[15m]") == 2
    return {**rule, "expr": rule["expr"].replace("[15m]", "[5s]"), "for": "2s"}


def wait_for(what: Callable[[], bool], timeout_s: float = 60) -> None:
    limit = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.2)


def test_a_dead_monitor_rings_and_a_living_one_does_not(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "watched", variants={"int8": mlp_model()})
    wanted = tmp_path / "wanted"
    wanted.write_text("watched-monitor")
    with (
        serve(
            engines,
            tmp_path / "log",
            prefix=["env", f"DYING_THREAD={wanted}"],
            module="tests.support.dying_service",
            precision="int8",
            monitor_share="1",
        ) as server,
        prometheus(tmp_path / "prometheus", [server.port], hastened) as watching,
    ):
        load = Load(server, "watched", clients=1)
        try:
            judged = 'sum(rate(vernier_precision_samples_total{result=~"within|over"}[5s])) > 0'

            def asked(expression: str) -> list[float]:
                watching.at = time.time()
                return watching.query(expression)

            wait_for(lambda: watching.is_up() and bool(asked(judged)))
            time.sleep(
                6
            )  # longer than the alert's window and its patience together, less would prove nothing
            assert ALERT not in watching.firing()
            server.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: ALERT in watching.firing())
        finally:
            load.stop()
        assert set(load.statuses) == {200}
        assert '"precision monitor died"' in server.log
