"""Whatever happens to Redis, at the start or later: clients live, the operator knows, and when it
is over so is its effect.
"""

import pytest

from .redis_faults import FAULTS, Fault
from .redis_run import WORST_PING, When, run

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("when", ["at start", "while running"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_gateway_survives_notices_and_recovers_from_a_fault_of_redis(
    fault: Fault, when: When, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = await run(fault, when)
    with capsys.disabled():
        print(f"\n{figures}")
    assert figures.recovered <= figures.may_take
    assert figures.ping_worst < WORST_PING
    assert figures.reconnects == 0
    assert (figures.doubled, figures.out_of_order) == (0, 0)
    if not fault.empties:
        assert (figures.missing, figures.gaps) == (0, 0)
    elif when == "while running":
        assert figures.gaps == 2  # one for each client
