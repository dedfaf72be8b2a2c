"""Printable text: untrusted text without characters that a terminal would interpret."""

from typing import Final

# C0, DEL and C1 (ECMA-48), line separators, and characters that change the text direction.
_CONTROLS: Final = {
    code: f"\\u{code:04x}"
    for code in (
        *range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F),
        *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C,
    )
}  # fmt: skip
_BUT_LINES: Final = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\n\t"}


def printable(text: str, *, lines: bool = False) -> str:
    """Escape the control characters of a text, as JSON does.

    ``lines`` keeps line breaks and tabs.
    """
    return text.translate(_BUT_LINES if lines else _CONTROLS)
