"""Reading the requests of the API: a body or a query becomes a type, or a problem names a field."""

from typing import Annotated, Final, TypeVar, cast

import msgspec
from quart import request

from ...core.api_keys import ApiKey
from ...core.decimals import is_decimal
from ...core.events import MAX_ID, with_whole_pairs
from .guard import Invalid

T = TypeVar("T")

TenantNumber = Annotated[int, msgspec.Meta(gt=0, le=MAX_ID)]


NOT_JSON: Final = "the body is not JSON, or is nested too deeply"


async def read_body(kind: type[T]) -> T:
    """The request's body as this type. Raises :exc:`Invalid`."""
    body = await read_bytes()
    try:
        try:
            return decode(body, kind)
        except msgspec.DecodeError:  # a text may have been cut inside an emoji
            return decode(with_whole_pairs(body), kind)
    except (msgspec.DecodeError, RecursionError):
        raise Invalid(422, NOT_JSON) from None


async def read_bytes() -> bytes:
    """The request's body."""
    return cast(bytes, await request.get_data(as_text=False))


def decode(body: bytes, kind: type[T]) -> T:
    """A body as this type.

    Raises :exc:`Invalid` if it is another one, and msgspec's errors if it can't be decoded.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Invalid(422, str(error)) from None
    except UnicodeDecodeError:
        raise Invalid(422, "the body is not UTF-8") from None


def read_id(name: str, *, least: int = 1) -> int:
    """A number in the query. Raises :exc:`Invalid`."""
    text = request.args.get(name, "")
    if not is_decimal(text, 19) or not least <= int(text) <= MAX_ID:
        raise Invalid(422, f"{name} must be {'a positive' if least else 'an'} integer")
    return int(text)


def check_tenant(key: ApiKey, tenant: int, field: str = "tenant_id") -> None:
    """Raise :exc:`Invalid` unless the key is for this tenant."""
    if not key.may_act_for(tenant):
        raise Invalid(403, f"{field}: tenant {tenant} is not one of this key's")
