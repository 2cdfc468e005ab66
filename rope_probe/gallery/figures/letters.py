"""Names as plotly shows them: letter by letter, without markup, and not too long."""

import hashlib
import re

LONGEST_NAME, LONGEST_LABEL = 60, 100
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "%": "&#37;", "$": "&#36;"}
_UNSEEN = (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_LITERAL = str.maketrans(_MARKUP | {chr(c): "&#92;" + chr(c).encode("unicode_escape").decode()[1:] for c in _UNSEEN})
_DIGEST = 8


def literal(text: str) -> str:
    """The text by which plotly shows `text` itself: no markup, no template, no TeX; what cannot be seen by its code."""
    return text.translate(_LITERAL)


def letters_of(text: str) -> list[str]:
    """The letters of a text, literal or not: a character, or an entity that shows as one."""
    return re.findall(r"&#?\w{1,6};|.", text, flags=re.DOTALL)


def short(text: str, longest: int = LONGEST_NAME) -> str:
    """The text, literal or not, in at most `longest` letters: a digest after an ellipsis tells long ones apart."""
    letters = letters_of(text)
    if len(letters) <= longest:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_DIGEST]
    return f"{''.join(letters[: longest - 1 - _DIGEST])}…{digest}"
