"""The messages that the client sends."""

import json


def message(name: str, **keys: str | int | bool) -> str:
    """A message of this type."""
    return json.dumps({"type": name, **keys})
