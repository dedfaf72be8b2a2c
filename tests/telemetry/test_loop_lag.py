import gc
import time

import trio

from trio_gateway.telemetry.loop_lag import LEAST, Stalls


async def test_a_turn_of_the_loop_that_takes_long_is_a_stall() -> None:
    stalls = Stalls()
    with stalls.watched():
        await trio.sleep(0.5)  # the loop waits for the sockets meanwhile
        number, waited = sum(stalls.turns.counts), stalls.turns.sum
        time.sleep(3 * LEAST)
        await trio.lowlevel.checkpoint()

    assert waited < 0.5
    assert sum(stalls.turns.counts) > number
    assert stalls.turns.sum >= waited + 3 * LEAST


async def test_collections_are_timed_while_watched() -> None:
    stalls = Stalls()
    with stalls.watched():
        gc.collect()
        seen = sum(stalls.collections.counts)
    gc.collect()

    assert seen >= 1
    assert sum(stalls.collections.counts) == seen
    assert stalls.collections.sum > 0
    assert stalls.collects not in gc.callbacks
