"""Goals of speed beside checks of what is right: both keep bounds, only checks fail the command."""

import json
import math

from benchmarks.gpu.report import Report


def test_a_missed_goal_is_recorded_and_fails_nothing(tmp_path):
    report = Report(tmp_path / "step.json")
    report.goal("utilization", 0.31, at_least=0.5)
    report.goal("step over its passes", 1.03, at_most=1.03)
    report.goal("rate", math.nan, at_least=1.0)
    report.check("loss", 2e-6, at_most=1e-6)
    assert [entry.name for entry in report.missed] == ["utilization", "rate"]
    assert [entry.name for entry in report.failed] == ["loss"]
    written = json.loads((tmp_path / "step.json").read_text())
    assert [(line["kind"], line["bound"], line["passed"]) for line in written] == [
        ("goal", ">= 0.5", False),
        ("goal", "<= 1.03", True),
        ("goal", ">= 1", False),
        ("check", "<= 1e-06", False),
    ]
