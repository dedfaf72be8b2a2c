import gc
import time

import trio

from trio_gateway.telemetry.loop_lag import MIN_TURN, LoopLag


async def test_long_step_of_the_loop_is_a_stall() -> None:
    loop_lag = LoopLag()
    with loop_lag.watched():
        await trio.sleep(0.5)  # the loop waits for its sockets
        number, waited = sum(loop_lag.turns.counts), loop_lag.turns.sum
        time.sleep(3 * MIN_TURN)
        await trio.lowlevel.checkpoint()

    assert waited < 0.5
    assert sum(loop_lag.turns.counts) > number
    assert loop_lag.turns.sum >= waited + 3 * MIN_TURN


async def test_collections_are_timed_while_watched() -> None:
    loop_lag = LoopLag()
    with loop_lag.watched():
        gc.collect()
        seen = sum(loop_lag.collections.counts)
    gc.collect()

    assert seen >= 1
    assert sum(loop_lag.collections.counts) == seen
    assert loop_lag.collections.sum > 0
    assert loop_lag.collects not in gc.callbacks
