"""How hard the prose is to read: grade level, longest sentence, share of sentences over 25 words, a page a row.

    python docs/readability.py                      # README.md and every page that is written by hand
    python docs/readability.py docs/findings.md -l  # with the sentences that are too long

Code blocks, tables, headings and HTML comments are left out. A piece of inline code counts as one word, an interval in
brackets too. The grade is Flesch-Kincaid's, by textstat, with syllables as pyphen hyphenates.
"""

import argparse
import re
import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nltk
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"docs/tables.md", "docs/models.md"}
LONGEST = 25
"""Words that a sentence of ours has at most, where it can be helped."""
CODE_WORD = "code"
_INTERVAL = re.compile(r"\[[^\]\[]*\d[^\]\[]*\]")
_POINT_IN_NUMBER = re.compile(r"(?<=\d)\.(?=\d)|(?<![\w.])\.(?=\d)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*]*\s+")


def sentences_of(markdown: str) -> list[str]:
    """The sentences of a page's paragraphs and list items, in order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    found = []
    for paragraph in _paragraphs(tokens):
        text = _INTERVAL.sub("interval", paragraph)
        text = _POINT_IN_NUMBER.sub("", text)  # textstat would end a sentence there
        found += [sentence.strip() for sentence in _SENTENCE_END.split(text) if words_of(sentence)]
    return found


def _paragraphs(tokens: list[Token]) -> Iterator[str]:
    """The text of each paragraph; headings and cells of tables are no paragraphs."""
    for before, token in pairwise(tokens):
        if before.type == "paragraph_open" and token.type == "inline":
            yield " ".join(_inline_text(token).split())


def _inline_text(token: Token) -> str:
    parts = []
    for child in token.children or []:
        if child.type == "text":
            parts.append(child.content)
        elif child.type == "code_inline":
            parts.append(CODE_WORD)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    return "".join(parts)


def words_of(sentence: str) -> list[str]:
    """What stands between spaces and holds a letter or a digit."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def grade_of(sentences: list[str]) -> float:
    """Flesch-Kincaid grade level by textstat."""
    import textstat

    ended = [sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences]
    return textstat.flesch_kincaid_grade(" ".join(ended))


def without_download(folder: Path) -> None:
    """Give nltk an empty pronouncing dictionary, so that textstat hyphenates every word and asks no network."""
    corpus = folder / "corpora" / "cmudict"
    corpus.mkdir(parents=True)
    (corpus / "cmudict").write_text("")
    nltk.data.path.insert(0, str(folder))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("-l", "--long", action="store_true", help="show the sentences over 25 words")
    options = parser.parse_args()
    by_hand = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = options.pages or [page for page in by_hand if str(page.relative_to(ROOT)) not in GENERATED]
    with tempfile.TemporaryDirectory() as folder:
        without_download(Path(folder))
        print("| page | sentences | grade | mean words | longest | over 25 words |\n|---|---|---|---|---|---|")
        for page in pages:
            sentences = sentences_of(page.read_text())
            if not sentences:
                continue
            lengths = [len(words_of(sentence)) for sentence in sentences]
            too_long = [length for length in lengths if length > LONGEST]
            name = page.resolve().relative_to(ROOT) if page.resolve().is_relative_to(ROOT) else page
            print(
                f"| {name} | {len(lengths)} | {grade_of(sentences):.1f} | {statistics.mean(lengths):.1f} | "
                f"{max(lengths)} | {len(too_long) / len(lengths):.0%} |"
            )
            if options.long:
                for sentence, length in zip(sentences, lengths, strict=True):
                    if length > LONGEST:
                        print(f"    {length}: {sentence}")


if __name__ == "__main__":
    main()
