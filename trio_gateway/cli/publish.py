"""``publish``: events from a file to Redis, as a backend would."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from ..core.printable import printable
from .errors import FAILED, Failure, settings_or_exit

if TYPE_CHECKING:
    from ..publisher import Publisher
    from .event_files import Line


class _Tally:
    """What became of the events so far."""

    def __init__(self) -> None:
        self.added = 0
        self.published = 0
        self.unheard = 0
        self.invalid = 0
        self._started = time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._started
        sent = self.added + self.published
        text = (
            f"{sent} published ({self.added} to streams, {self.published} on channels),"
            f" {self.invalid} invalid, in {seconds:.1f} s"
        )
        if seconds >= 0.1:
            text += f", {sent / seconds:.0f}/s"
        return text


@click.command()
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="FILE|-"
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=0,
    metavar="N",
    help="Events a second; 0, the default, is as fast as it goes.",
)
@click.option("--repeat", type=click.IntRange(min=1), default=1, help="Play the file so often.")
@click.option("--now", is_flag=True, help="Set each event's ts to the present.")
def publish(file: str, rate: float, repeat: int, now: bool) -> None:
    """Publish one event, or a file of them, to the Redis at REDIS_URL.

    FILE holds one JSON object, or one a line: an event, or {"channel": …, "event": …} for where
    to send it. An event alone goes where its type belongs: durable ones to the first of
    REDIS_STREAMS, the others on a channel.
    """
    from ..publisher import Publisher, PublishFailed

    settings = settings_or_exit()
    streams = settings.redis_streams
    if not streams:
        raise Failure("REDIS_STREAMS is empty: there is nowhere to add durable events", 2)
    tally = _Tally()
    with (
        click.open_file(file, "rb") as opened,
        closing(
            Publisher(
                settings.redis_url,
                stream=streams[0],
                max_length=None,  # how long the backends' stream is kept is theirs to say
                routes=settings.routes,
            )
        ) as to,
    ):
        lines = _lines(opened, repeat)
        status = 0
        try:
            for line in _with_progress(_paced(lines, rate), _count(file, repeat)):
                _publish(to, line.now() if now else line, streams, tally)
        except PublishFailed as failed:
            click.echo(printable(f"trio-gateway: {failed}"), err=True)
            status = FAILED
        except KeyboardInterrupt:
            status = 130
    click.echo(str(tally))
    if tally.unheard:
        click.echo(
            f"trio-gateway: nobody listens to {tally.unheard} of them:"
            " is a gateway running on this Redis, with these patterns?",
            err=True,
        )
    raise SystemExit(status or (FAILED if tally.invalid else 0))


def _publish(to: "Publisher", line: "Line", streams: Iterable[str], tally: _Tally) -> None:
    from ..core.event_ids import DEFAULT_STREAM
    from ..publisher import InvalidEvent

    where: dict[str, str] = {}
    if line.channel is not None:
        named_stream = line.channel in {DEFAULT_STREAM, *streams}
        where = {"stream" if named_stream else "channel": line.channel}
    try:
        said = to.publish(line.event, **where)
    except InvalidEvent as invalid:
        tally.invalid += 1
        click.echo(printable(f"line {line.number}: {invalid}"), err=True)
        return
    if isinstance(said, str):
        tally.added += 1
    else:
        tally.published += 1
        tally.unheard += not said


def _lines(file: Any, repeat: int) -> Iterator["Line"]:
    from .event_files import read_lines

    if repeat == 1:
        yield from read_lines(file)
        return
    lines = list(read_lines(file))
    for _ in range(repeat):
        yield from lines


def _count(file: str, repeat: int) -> int | None:
    """How many events to expect, if that can be known."""
    if file == "-":
        return None
    with open(file, "rb") as opened:
        return repeat * sum(1 for _ in _lines(opened, 1))


def _paced(lines: Iterator["Line"], rate: float) -> Iterator["Line"]:
    started = time.monotonic()
    for i, line in enumerate(lines):
        if rate and (wait := started + i / rate - time.monotonic()) > 0:
            time.sleep(wait)
        yield line


def _with_progress(lines: Iterator["Line"], total: int | None) -> Iterator["Line"]:
    """The same lines; on a terminal with a bar under what is printed meanwhile."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from lines
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(lines, total=total)
