"""The manual's page of fields, and ``train --help``: all that there are, in words, as the code has them."""

import dataclasses
import pathlib

import pytest

from mtpd_jax import frontdoor, reference
from mtpd_jax.config import sections
from mtpd_jax.fields import Section, field

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "configuration.md"
CLASSES = [cls for section in sections().values() for cls in (section.cases.values() or [section])]


@dataclasses.dataclass(frozen=True)
class _Above(Section):
    # Of the base,
    # in two lines.
    first: int = field(1)


@dataclasses.dataclass(frozen=True)
class _Below(_Above):
    second: str | None = field(None, resumable=True)  # beside
    # Above, and

    third: float = field(  # in the middle
        0.5
    )  # and behind


def test_comments_above_and_beside_are_read_and_those_of_bases():
    first, second, third = reference.field_words(_Below)
    assert first.comment == "Of the base, in two lines." and first.default == "1" and not first.resumable
    assert second.comment == "beside" and second.type == "str or None" and second.resumable
    assert third.comment == "in the middle and behind"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_is(cls):
    found = reference.field_words(cls)
    assert [one.name for one in found] == [one.name for one in dataclasses.fields(cls)]
    assert all(one.comment for one in found), [one.name for one in found if not one.comment]


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text() == reference.markdown(), (
        "write it anew: python -m mtpd_jax.reference > docs/configuration.md"
    )


def test_help_lists_flags_and_fields(capsys):
    with pytest.raises(SystemExit) as ended:
        frontdoor.parse_config_flags(["--help"], "what it is for")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "what it is for" in said and "--dry_run" in said
    for name, section in sections().items():
        for cls in section.cases.values() or [section]:
            for one in dataclasses.fields(cls):
                assert f"--config.{name}.{one.name}={one.default!r}" in said
