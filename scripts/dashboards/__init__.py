"""Writes monitoring/grafana/dashboards/*.json: `python -m scripts.dashboards [--check]`.

Dashboards are generated so that a metric's name and its labels stand in one place, and a test can evaluate
every expression.
"""
