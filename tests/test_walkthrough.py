"""Snippets of docs/walkthrough.md run and print the output below them; pages have no dead links."""

import contextlib
import io
import re

from helpers import ROOT


def test_every_snippet_prints_the_output_below(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/walkthrough.md").read_text()
    pairs = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", page, re.DOTALL)
    assert len(pairs) == page.count("```python") == 11, "every snippet has an output"
    names = {}
    for code, expected in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == expected, code


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        words = re.sub(r"```.*?```|`[^`]*`(?!\])", "", page.read_text(), flags=re.DOTALL)  # without code
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", words):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
