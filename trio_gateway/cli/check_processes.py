"""``check`` of the processes of the service: do they answer, and do their settings agree?"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .check_report import Report
from .errors import Failure
from .service import ask_service

if TYPE_CHECKING:
    from ..cluster.observing import Service
    from ..cluster.questions import Answers
    from ..core.control_messages import Node
    from ..settings import Settings

_OWN: Final = "this check"


class Found(NamedTuple):
    """What Redis and the processes say."""

    nodes: "dict[str, Node]"
    settings: dict[str, dict[str, Any]]  # by process
    answers: "Answers"


def check_processes(settings: "Settings", report: Report) -> None:
    """Report on the processes that run on this Redis, if any do."""
    import msgspec

    from ..cluster.building import common_settings

    try:
        found = ask_service(settings, _ask)
    except Failure as failure:
        report.fail(f"processes: {failure.message}", "see the log of Redis")
        return
    if not found.nodes:
        report.ok("processes: none is alive on this Redis yet")
        return
    before = report.problems
    if missing := found.answers.missing:
        report.fail(
            f"processes: {len(missing)} of {len(found.nodes)} do not answer: {', '.join(missing)}",
            "see whether they are stopped (SIGSTOP) or have no CPU, and their logs",
        )
    own = msgspec.json.decode(msgspec.json.encode(common_settings(settings)))
    for problem in differences({_OWN: own, **found.settings}):
        report.fail(problem, "set it to the same value in all processes, and restart them")
    versions = grouped({name: node.version for name, node in found.nodes.items()})
    if len(versions) > 1:
        report.warn(f"processes have different versions, as in a deploy: {_list(versions)}")
    if report.problems == before:
        report.ok(f"processes: {len(found.nodes)} answer, with the same settings")


async def _ask(service: "Service") -> Found:
    from ..core.control_messages import Hello

    answers = await service.control.ask("hello", Hello())
    nodes, settings = await service.registry.read(), await service.registry.read_settings()
    return Found(nodes, settings, answers)


def differences(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each setting that is not the same for all; one that an older version does not
    know is not compared with it."""
    found = []
    for name in dict.fromkeys(name for each in settings.values() for name in each):
        values = grouped({who: _text(each[name]) for who, each in settings.items() if name in each})
        if len(values) > 1:
            found.append(f"{name} differs: {_list(values)}")
    return found


def grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Who has each value."""
    found: dict[str, list[str]] = {}
    for who, value in values.items():
        found.setdefault(value, []).append(who)
    return found


def _list(groups: Mapping[str, Iterable[str]]) -> str:
    return ", ".join(f"{value} ({', '.join(who)})" for value, who in groups.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
