"""Text that needs no download: the topics of the language reference that every Python carries (PSF licence)."""

from functools import cache
from pydoc_data import topics


@cache
def documents() -> tuple[str, ...]:
    """About eighty documents of English prose and code, in a fixed order; their number and wording vary with Python's
    version, so manifests hash the tokens made of them.
    """
    return tuple(text.strip() for _, text in sorted(topics.topics.items()))
