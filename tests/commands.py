"""The commands that the README and the manual show, as their readers would type them."""

import itertools
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python -m|make|pip install)\b"
# In a sentence, our own commands are called by their names, with the flags that it is about.
_FRAGMENT = re.compile(r"`(?:mtpd_jax\.)?(generate|evaluate|convert|corpus) ([^`]*--[^`]*)`")
_INLINE = re.compile(rf"`({_COMMAND}[^`]*)`")
# What stands for something that the reader knows: there is no telling whether it is a command.
_OUTLINE = re.compile(r"…|\.\.\.|\bNAME\b| \| ")


def _lines_of(text):
    """The lines of a page's blocks that begin as commands do, whole where they go on on the next one."""
    blocks = [block for language, block in _FENCED.findall(text) if language in ("", "bash", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(rf"\s*{_COMMAND}", line)]


def commands_of(text):
    """Every command of a page, a list of words each; outlines such as ``python -m experiments.NAME`` are none.

    Variables of the environment before a command are left out, and where its Python lies.
    """
    shown = _lines_of(text) + [" ".join(one.split()) for one in _INLINE.findall(prose_of(text))]
    found = []
    for line in shown:
        words = shlex.split(line, comments=True)
        if not _OUTLINE.search(" ".join(words)):
            words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def fragments_of(text):
    """The name of a module and the flags that a sentence gives it, where it leaves others out."""
    return [(f"mtpd_jax.{name}", *re.findall(r"--\w+", rest)) for name, rest in _FRAGMENT.findall(prose_of(text))]


def prose_of(text):
    """A page without its blocks."""
    return _FENCED.sub("", text)


ALL = sorted({(str(page.relative_to(ROOT)), *words) for page in PAGES for words in commands_of(page.read_text())})
FRAGMENTS = sorted({one for page in PAGES for one in fragments_of(page.read_text())})
OUTLINES = [line for page in PAGES for line in _lines_of(page.read_text()) if _OUTLINE.search(line.partition("#")[0])]
