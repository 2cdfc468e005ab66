"""Code blocks of Markdown pages: what they are, whether they are run, and running them.

A block is run by its language:

- `python`: in the page's one namespace, block after block;
- `console`: each line is a `rope-probe` command, and must end with exit code 0;
- `toml`: a configuration of `rope-probe distill`, run for one step; a part of one must be read without complaint.

`text` is for what is no code: listings and output. A block that cannot run here has an HTML comment before it,
`<!-- not run: why -->`. With `<!-- in the tests, smollm2-135m is a tiny model -->` somewhere on a page, its blocks get
a tiny random model of as many layers and heads in that one's place.

Blocks run in a folder with tiny checkpoints under the names that the pages use (see `lay_out`).
"""

import contextlib
import io
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from markdown_it import MarkdownIt

from rope_probe import cli
from rope_probe.distillation import distill, read_config
from rope_probe.distillation.terms import base
from rope_probe.runs.tables import TABLES

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "console", "toml")
STAND_IN = "<!-- in the tests, smollm2-135m is a tiny model -->"
_REASON = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->\s*$", re.DOTALL)
_NAMED = "smollm2-135m"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page: where it begins, its language and text, and why it is not run, if it is not."""

    line: int
    language: str
    text: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES and self.reason is None


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order. Indented code is found too, as a block without a language."""
    found, before = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            said = None if before is None else _REASON.search(before)
            found.append(Block(token.map[0] + 1, token.info.strip(), token.content, said and said[1]))
        before = token.content if token.type == "html_block" else None
    return found


def links_of(page: Path) -> list[Path]:
    """The files that a page links to, or shows as pictures."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    inside = [child for token in tokens for child in token.children or []]
    targets = [
        child.attrGet("href") or child.attrGet("src") for child in inside if child.type in ("link_open", "image")
    ]
    files = [str(target).partition("#")[0] for target in targets if "://" not in str(target)]
    return [(page.parent / file).resolve() for file in files if file]


def lay_out(folder: Path) -> None:
    """Tiny checkpoints, texts and shortened examples, under the names that pages use."""
    reader = _tiny(layers=2, heads=4, groups=2, width=32, head_dim=8)
    for name in ("MODEL", "BEFORE", "ORIGINAL"):
        reader.save_pretrained(folder / name)
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for name in ("AFTER", "EXTENDED"):
        reader.save_pretrained(folder / name)
    _tiny(layers=30, heads=9, groups=3, width=36, head_dim=8).save_pretrained(folder / "stand-in")
    for name in ("MODEL", "BEFORE", "ORIGINAL", "AFTER", "EXTENDED", "stand-in"):
        hf.ByT5Tokenizer().save_pretrained(folder / name)
    for name in (
        "runs/base-0/checkpoint",
        "runs/teacher-0/checkpoint",
        "runs/extension/checkpoints/extension",
    ):  # of key-value streams, without a tokenizer
        _tiny(layers=2, heads=2, groups=2, width=32, head_dim=16, vocabulary=516).save_pretrained(folder / name)
    (folder / "book.txt").write_text("The keeper of the lighthouse counted the stairs, and then the ships. " * 200)
    (folder / "examples").mkdir()
    for example in (ROOT / "examples").glob("*.toml"):
        (folder / "examples" / example.name).write_text(_of_one_step(example.read_text()))


def _of_one_step(config: str) -> str:
    """A configuration whose phases take one step, of no more tokens than the longest window here needs."""
    short = re.sub(r"(?m)^steps = \d+", "steps = 1", config)
    return re.sub(r"(?m)^(batch_tokens) = (\d+)", lambda found: f"{found[1]} = {min(int(found[2]), 16_384)}", short)


def _tiny(
    *, layers: int, heads: int, groups: int, width: int, head_dim: int, vocabulary: int = 384
) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config).eval()


def run_page(page: Path) -> int:
    """Run the blocks of a page that can run, in the current folder; how many there were. What fails, raises."""
    module = types.ModuleType("page")
    sys.modules["page"] = module  # dataclasses look their module up
    stands_in = STAND_IN in page.read_text()
    registries = [(registry, dict(registry)) for registry in (TABLES, base._KINDS)]
    count = 0
    try:
        for block in blocks_of(page):
            if not block.runs:
                continue
            text = block.text.replace(_NAMED, "stand-in") if stands_in else block.text
            if block.language == "python":
                lines = "\n" * block.line + text  # so that a traceback has the page's line numbers
                exec(compile(lines, str(page), "exec"), module.__dict__)
            elif block.language == "console":
                for command in commands_of(text):
                    _run_command(command, f"{page.name}, line {block.line}")
            else:
                run_toml(text, f"runs/of-page-{count}")
            count += 1
    finally:
        del sys.modules["page"]
        for registry, before in registries:  # tables and terms that a page declares as an example
            registry.clear()
            registry.update(before)
    return count


def commands_of(text: str) -> list[list[str]]:
    """The words of each command, comments left out."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def _run_command(words: list[str], where: str) -> None:
    if words[0] != "rope-probe":
        raise ValueError(f"{where}: only rope-probe runs here, not {words[0]!r}; mark the block with why it is not run")
    argv, sys.argv = sys.argv, words
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"{where}: {shlex.join(words)} ended with {stop.code}: {said.getvalue()}") from stop
    finally:
        sys.argv = argv


_HEAD = 'out = "runs/part"\nstudent = "MODEL"\nteachers = { long = "MODEL", teacher = "MODEL" }\n'
_PHASE = '[[phases]]\nname = "part"\nsteps = 1\nbatch_tokens = 4096\nlr = 1e-3\n'
_STREAM = 'window = 64\ndata = { kind = "text" }\n'
_TERMS = 'terms = [{ kind = "cross_entropy" }]\n'


def run_toml(text: str, out: str) -> None:
    """Distil by a configuration, for one step into `out`; a part of one is completed, and read alone."""
    whole = "student" in text
    if not whole:
        if "[[phases]]" not in text:
            text = _PHASE + ("" if "[[phases.streams]]" in text else _STREAM) + text
        text = _HEAD + text
    file = Path("page.toml")
    file.write_text(_of_one_step(text))
    config = read_config(file, out=out)
    if whole:
        distill(config)
