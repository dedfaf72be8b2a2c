"""``check`` of the rights that receipts need, and events that must reach somebody."""

from typing import TYPE_CHECKING

from .check_report import Asking, Report

if TYPE_CHECKING:
    from ..settings import Settings


async def check_receipts(settings: "Settings", asking: Asking, report: Report) -> None:
    """Whether receipts can be kept, and the steps of events be taken that must reach somebody."""
    from ..broker.receipt_store import key_prefix
    from ..broker.shard_claims import KEY

    names = settings.sharding.names
    pattern = f"{key_prefix(names[0])}*" if len(names) == 1 else "{*}:receipts:*"
    with report.trying(
        f"receipts in {pattern}",
        f"allow this user the keys: ACL SETUSER … ~{pattern}"
        " +eval +hsetnx +hset +hget +hgetall +pexpireat",
    ):
        for name in names:
            key = f"{key_prefix(name)}check"
            await asking.call("EVAL", "return 0", 0)
            await asking.call("HSETNX", key, "event", "")
            await asking.call("HSET", key, "event", "")
            await asking.call("HGET", key, "event")
            await asking.call("HGETALL", key)
            await asking.call("PEXPIREAT", key, 1)  # deletes it
    if not any(route.steps for route in settings.routes.values()):
        return
    streams = names[0] if len(names) == 1 else f"{names[0].partition(':{')[0]}*"
    with report.trying(
        "events that must reach somebody (XADD, XRANGE)",
        f"allow this user: ACL SETUSER … ~{pattern} ~{streams} +hexists +time +xrange +xadd",
    ):
        for name in names:
            await asking.call("HEXISTS", f"{key_prefix(name)}check", "step:0")
            await asking.call("XRANGE", name, "0-1", "0-1")
            # No entry can have this id: an error, and nothing is added.
            await asking.call("XADD", name, "0-0", "check", "", unless="greater than 0-0")
        await asking.call("TIME")
    if settings.sharding.by_tenant:
        with report.trying(
            "shards without clients (HSET, PEXPIRE)",
            f"allow this user: ACL SETUSER … ~{KEY}* +eval +time +hgetall +hset +pexpire",
        ):
            await asking.call("HGETALL", f"{KEY}:check")
            await asking.call("HSET", f"{KEY}:check", "check", ":0")
            await asking.call("PEXPIRE", f"{KEY}:check", 0)  # deletes it
