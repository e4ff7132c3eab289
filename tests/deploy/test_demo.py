from __future__ import annotations

import pytest

from deploy.demo import SumCheck, Summary, judge

GOOD = Summary(40, 40, {"finished": 40}, SumCheck(checked=40, broken=0, max_unattributed_share=0.001))


@pytest.mark.parametrize(
    ("summary", "problems"),
    [
        (GOOD, 0),
        (Summary(40, 40, {"finished": 39, "error": 1}, GOOD.sum_check), 1),
        (Summary(40, 39, {"finished": 39}, GOOD.sum_check), 1),
        (Summary(40, 40, GOOD.fates, SumCheck(checked=39, broken=0, max_unattributed_share=0.0)), 1),
        (Summary(40, 40, GOOD.fates, SumCheck(checked=40, broken=2, max_unattributed_share=0.0)), 1),
        (Summary(40, 40, GOOD.fates, SumCheck(checked=40, broken=0, max_unattributed_share=0.02)), 1),
    ],
)
def test_demo_fails_for_what_does_not_hold(summary: Summary, problems: int) -> None:
    assert len(judge("recorded", summary)) == problems
