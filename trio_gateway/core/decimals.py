"""Decimals: check that a text is a plain decimal number before int() reads it."""


def is_decimal(text: str, most_digits: int) -> bool:
    """Whether this is 1 to ``most_digits`` ASCII digits, without sign, space or underscore."""
    return text.isascii() and text.isdigit() and len(text) <= most_digits
