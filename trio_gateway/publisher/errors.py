"""How publishing an event can fail."""


class PublishFailed(Exception):  # noqa: N818 - an outcome
    """The event was not published. The text has the address and the reason, but no password.

    Its subclass :exc:`InDoubt` is the exception to this: ``in_doubt`` is True for that one.
    """

    in_doubt = False


class InDoubt(PublishFailed):
    """The event may have been published, or is on fewer servers than ``confirm`` asks for.

    It was sent, but its reply was lost, in the first or the second attempt; or the replicas did
    not confirm it in time. Publishing it again is safe if it has an ``id``.

    ``entry`` is the id of its entry in the stream, if Redis has told it.
    """

    in_doubt = True

    def __init__(self, text: str, *, entry: str | None = None) -> None:
        super().__init__(text)
        self.entry = entry
