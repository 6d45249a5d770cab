"""Rules: accepted by promtool, each tested by promtool, and named in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from scripts import prometheus_rule
from tests.ops.conftest import Run
from tests.ops.expressions import ROOT, RULES, every_expression

PROMETHEUS = ROOT / "monitoring" / "prometheus"
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def alerts() -> list[dict[str, object]]:
    groups = [group for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_promtool_accepts_the_configuration_and_every_rule(promtool: Run) -> None:
    done = promtool(["check", "config", str(PROMETHEUS / "prometheus.yml")])
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool(["check", "rules", *map(str, sorted(RULES.glob("*.yml")))])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_tests_of_the_rules_pass(promtool: Run) -> None:
    done = promtool(["test", "rules", *map(str, UNIT_TESTS)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_in_some_unit_test() -> None:
    written = "".join(path.read_text() for path in UNIT_TESTS)
    missing = {str(rule["alert"]) for rule in alerts() if str(rule["alert"]) not in written}
    assert not missing


def test_every_alert_says_what_to_do_and_where_to_read_on() -> None:
    reliability = (ROOT / "docs" / "reliability.md").read_text()
    headings = {
        re.sub(r"[^\w-]", "", line[4:].strip().lower())
        for line in reliability.splitlines()
        if line[:4] == "### "
    }
    for rule in alerts():
        notes = rule["annotations"]
        assert isinstance(notes, dict)
        assert notes["summary"], rule["alert"]
        assert notes["description"], rule["alert"]
        page, _, anchor = notes["runbook"].partition("#")
        assert page == "docs/reliability.md"
        assert anchor in headings, f"docs/reliability.md has no section {rule['alert']}"


def test_every_alert_is_a_page_or_a_ticket() -> None:
    for rule in alerts():
        labels = rule["labels"]
        assert isinstance(labels, dict)
        assert labels["severity"] in {"page", "ticket"}, rule["alert"]


def test_every_expression_of_dashboards_and_autoscalers_parses(promtool: Run, tmp_path: Path) -> None:
    rules = [
        {"record": f"check:{number}", "expr": expression.text}
        for number, expression in enumerate(every_expression())
    ]
    path = tmp_path / "all.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = promtool(["check", "rules", str(path)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kubernetes_form_of_the_rules_is_current() -> None:
    assert prometheus_rule.OUT.read_text() == prometheus_rule.rendered(), (
        "run `python -m scripts.prometheus_rule`"
    )
