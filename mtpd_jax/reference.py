"""The fields of a configuration in words, as ``train --help`` and the manual show them: read off the code itself.

``python -m mtpd_jax.reference`` prints the manual's page.
"""

import ast
import dataclasses
import functools
import inspect
import io
import shutil
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping

from mtpd_jax.config import sections
from mtpd_jax.fields import Section, type_words

_PAGE = """# Configuration

Every field, its default, what it may be and what it is; made by `python -m mtpd_jax.reference` from the dataclasses
that the code reads ([mtpd_jax/config.py](../mtpd_jax/config.py), and beside the code of each source and method). On the
command line a field is `--config.section.field=value`; in a config file, `config.section.field = value`. A run may go
on with another value of a field marked *resumable*; any other that differs is refused by name.
"""


@dataclasses.dataclass(frozen=True)
class FieldWords:
    """A field in words.

    Attributes:
      name: in its section.
      type: what a value may be, as the messages name it.
      default: as Python writes it.
      expected: what else is asked of a value; nothing where any will do.
      comment: what it is.
      resumable: whether a run may go on with another value.
    """

    name: str
    type: str
    default: str
    expected: str
    comment: str
    resumable: bool


def field_words(section: type[Section]) -> list[FieldWords]:
    """The fields of a section, or of one of its cases, those of its bases included."""
    comments: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base) and base is not Section:
            comments |= _comments(base)
    hints = typing.get_type_hints(section)
    return [
        FieldWords(
            one.name,
            type_words(hints[one.name]),
            repr(one.default),
            ", ".join(constraint.expected for constraint in one.metadata["constraints"]),
            comments[one.name],
            one.metadata["resumable"],
        )
        for one in dataclasses.fields(section)
    ]


@functools.cache
def _comments(cls: type) -> Mapping[str, str]:
    """What stands beside the fields that a class itself declares, or in the lines right above them."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {one.start[0]: one for one in tokens if one.type == tokenize.COMMENT}
    alone = {line for line, one in comments.items() if one.line.lstrip().startswith("#")}
    (declared,) = ast.parse(source).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for node in declared.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        # The lines above, up to the first that is no comment, and then what stands beside.
        begin = node.lineno
        while begin - 1 in alone:
            begin -= 1
        lines = [*range(begin, node.lineno), *range(node.lineno, (node.end_lineno or node.lineno) + 1)]
        found[node.target.id] = " ".join(comments[line].string.lstrip("# ") for line in lines if line in comments)
    return found


def _parts() -> Iterator[tuple[str, str, type[Section]]]:
    """Every section, or case of one: its name, what chooses it, and its class."""
    for name, section in sections().items():
        if not section.tag:
            yield name, "", section
        for case, cls in section.cases.items() if section.tag else ():
            yield name, f"{name}.{section.tag}={case}", cls


def help_text() -> str:
    """Every field, a line each, for a terminal of the width that there is."""
    lines, width = [], shutil.get_terminal_size().columns
    for name, chosen_by, section in _parts():
        lines.append(f"\n  with --config.{chosen_by}:" if chosen_by else "")
        for one in field_words(section):
            lines.append(f"  --config.{name}.{one.name}={one.default}")
            words = "; ".join(filter(None, [one.comment.rstrip("."), one.expected and f"expected: {one.expected}"]))
            lines += textwrap.wrap(words, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def markdown() -> str:
    """The manual's page: a table per section, and per case of one."""
    parts = [_PAGE]
    for name, chosen_by, section in _parts():
        doc = inspect.cleandoc(section.__doc__ or "")
        own = "" if doc.startswith(f"{section.__name__}(") else doc.partition("\n\n")[0].replace("\n", " ")
        parts.append(f"## `{chosen_by or name}`\n")
        if own:
            parts.append(f"{own.replace('``', '`')}\n")
        parts.append("| field | default | may be | what it is |\n|---|---|---|---|")
        for one in field_words(section):
            may_be = "; ".join(filter(None, [one.type, one.expected])).replace("|", "\\|")
            default = one.default.replace("|", "\\|")
            comment = one.comment.replace("|", "\\|") + (" *(resumable)*" if one.resumable else "")
            parts.append(f"| `{one.name}` | `{default}` | {may_be} | {comment} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
