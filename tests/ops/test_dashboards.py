"""Dashboards: current, laid out without overlap, and reading one data source."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from scripts.dashboards.__main__ import OUT, rendered
from tests.ops.expressions import DASHBOARDS, ROOT

BOARDS = {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
PROVISIONING = ROOT / "monitoring" / "grafana" / "provisioning"


def test_the_files_are_what_the_generator_writes() -> None:
    assert {path.name: path.read_text() for path in OUT.glob("*.json")} == rendered(), (
        "run `python -m scripts.dashboards`"
    )


def test_there_is_a_dashboard_for_service_precision_and_gpu() -> None:
    assert set(BOARDS) == {"service.json", "precision.json", "gpu.json"}
    assert len({board["uid"] for board in BOARDS.values()}) == 3


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_stay_within_the_grid(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[name]["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24, panel["title"]
        for x in range(box["x"], box["x"] + box["w"]):
            for y in range(box["y"], box["y"] + box["h"]):
                assert (x, y) not in taken, f"{panel['title']} covers {taken.get((x, y))}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_its_own_number_a_text_and_known_variables(name: str) -> None:
    board = BOARDS[name]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    declared = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        for query in panel["targets"]:
            used = {part.split('"')[0].split("]")[0] for part in query["expr"].split("$")[1:]}
            assert used <= declared, (panel["title"], used - declared)
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_grafana_is_given_the_data_source_and_the_folder_that_the_dashboards_need() -> None:
    sources: dict[str, Any] = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())
    assert sources["datasources"][0]["uid"] == "prometheus"
    scrape = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text())["global"]
    assert sources["datasources"][0]["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "vernier.yml").read_text())["providers"][0]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounts = compose["services"]["grafana"]["volumes"]
    assert f"./monitoring/grafana/dashboards:{provider['options']['path']}:ro" in mounts
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(provider["options"]["path"] + "/") in BOARDS
