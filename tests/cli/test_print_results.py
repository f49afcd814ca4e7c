"""Tables of metrics on stdout."""

from __future__ import annotations

import pytest

from qlip.cli.evaluation.print_results import print_results
from qlip.evaluation.evaluators.base import MetricValue

from ..evaluation.test_result import measured, result


def test_print_results__many_metrics_are_printed_as_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Many metrics are printed one per row, a few as columns."""
    many = {f"metric_{number}": MetricValue(number + 0.25) for number in range(40)}
    few = {"linear": MetricValue(0.5), "knn": MetricValue(0.25)}
    print_results(
        [
            result(
                measured(evaluator="probe", data="photographs", values=many),
                measured(evaluator="sets", data="drawings", values=few),
            )
        ]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["set", "photographs"] in lines and ["metric_39", "39.250"] in lines
    assert any(line[-2:] == ["0.500", "0.250"] and "drawings" in line for line in lines)
