"""HTTP requests to a gateway."""

import http.client
import ssl
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from .errors import Failure
from .url import no_listener, read_url

_TIMEOUT: Final = 10.0  # seconds for one response
_MAX_BYTES: Final = 1 << 20  # of one response

_ADVICE: Final = {
    401: "put a token of this gateway into TRIO_GATEWAY_TOKEN",
    403: "put a token of an ADMIN of the event's tenant and branch into TRIO_GATEWAY_TOKEN",
    404: "there is no gateway, or an older one, or it has another path",
    429: "wait a minute",
    503: "a dependency of the gateway is down: try again in a while",
}


def fetch(url: str, path: str, token: str, body: bytes | None = None) -> Mapping[str, Any]:
    """Return the JSON object that a gateway answers; POST if there is a JSON body.

    The token goes in a header. Raises :exc:`Failure`.
    """
    parts = read_url(url)
    where, host = parts.netloc, parts.hostname or ""
    connect = http.client.HTTPSConnection if parts.scheme == "wss" else http.client.HTTPConnection
    connection = connect(host, parts.port, timeout=_TIMEOUT)
    headers = {"Content-Type": "application/json"}
    try:
        headers["Authorization"] = f"Bearer {token.encode('ascii').decode()}"
        method = "GET" if body is None else "POST"
        connection.request(method, f"{parts.path}{path}", body, headers)
        response = connection.getresponse()
        status, text = response.status, response.read(_MAX_BYTES)
    except ConnectionRefusedError:
        raise Failure(no_listener(where)) from None
    except TimeoutError:
        raise Failure(f"no answer from {where} in {_TIMEOUT:g} s: is that a gateway?") from None
    except ssl.SSLError as error:
        raise Failure(f"no TLS with {where}: {error.reason}") from None
    except OSError as error:
        raise Failure(f"can't connect to {where}: {error.strerror}") from None
    except http.client.HTTPException:
        raise Failure(f"{where} does not speak HTTP") from None
    except ValueError:  # its text would show the token
        raise Failure("the value of TRIO_GATEWAY_TOKEN is not a token") from None
    finally:
        connection.close()
    try:
        answer = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = {}
    if status == 200 and answer:
        return answer
    reason = answer.get("error")
    problem = f"{where} answers with HTTP {status}" + (f" ({reason})" if reason else "")
    advice = _ADVICE.get(status, "" if reason else "there is no gateway, or it has another path")
    raise Failure(f"{problem}: {advice}" if advice else problem)
