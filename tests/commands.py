"""The commands that the README and the manual show, as their readers would type them."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```(?:bash|sh)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:python -m|make|pip install)[^`]*)`")
# What stands for something that the reader knows: there is no telling whether it is a command.
_OUTLINE = re.compile(r"…|\.\.\.|\bNAME\b| \| ")


def _lines_of(text):
    """The lines of a page's blocks that begin as commands do, whole where they go on on the next one."""
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"\s*(python -m|make|pip install)\b", line)]


def commands_of(text):
    """Every command of a page, a list of words each; outlines such as ``python -m experiments.NAME`` are none."""
    shown = _lines_of(text)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    shown += [" ".join(one.split()) for one in _INLINE.findall(prose)]
    found = []
    for line in shown:
        words = shlex.split(line, comments=True)
        if not _OUTLINE.search(" ".join(words)):
            found.append(words)
    return found


ALL = sorted({(str(page.relative_to(ROOT)), *words) for page in PAGES for words in commands_of(page.read_text())})
OUTLINES = [line for page in PAGES for line in _lines_of(page.read_text()) if _OUTLINE.search(line.partition("#")[0])]
