"""Compression (RFC 7692): agreed to on the line with who offers it, if WS_COMPRESSION says so."""

from typing import NamedTuple

from wsproto.extensions import PerMessageDeflate

_WHOLE_WINDOW = 15  # bits


class Agreed(NamedTuple):
    """What reads compressed messages, and the header that says what was agreed to."""

    extension: PerMessageDeflate
    answer: str


def agree(offers: str) -> Agreed | None:
    """The first of a client's offers (``Sec-WebSocket-Extensions``) that we can live with.

    A message is compressed once, on its own and with the whole window, for everybody: no message
    refers to one before it, and who insists on a smaller window gets plain ones.
    """
    for offer in offers.split(","):
        name = offer.partition(";")[0].strip().lower()
        if name != PerMessageDeflate.name:
            continue
        extension = PerMessageDeflate(
            client_no_context_takeover=True, server_no_context_takeover=True
        )
        try:
            parameters = extension.accept(offer)
        except ValueError:
            continue
        if parameters and extension.server_max_window_bits == _WHOLE_WINDOW:
            return Agreed(extension, f"{name}; {parameters}")
    return None
