"""docs/walkthrough.md runs, and prints what stands below each snippet."""

import contextlib
import io
import re

from helpers import ROOT


def test_every_snippet_prints_what_stands_below_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/walkthrough.md").read_text()
    pairs = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", page, re.DOTALL)
    assert len(pairs) == page.count("```python") == 11, "none without its output"
    names = {}
    for code, expected in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == expected, code
