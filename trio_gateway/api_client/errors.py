"""How a call can fail."""


class CallFailed(Exception):  # noqa: N818 - an outcome
    """The gateway did not do what it was asked for. The text never contains the secret.

    ``status`` is the HTTP status, None if there was no answer. ``retry_after`` is the number of
    seconds after which the gateway or a proxy wants to be asked again, if it says so. ``in_doubt``
    is true if the gateway may still have done it, because its answer was lost.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        in_doubt: bool = False,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after
        self.in_doubt = in_doubt
