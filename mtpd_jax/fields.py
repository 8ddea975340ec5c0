"""What a configuration is made of: fields with a default, a constraint and a history, in sections that may have cases.

A section with cases is one of several classes, told apart by a tag: the fields of ``objective`` depend on
``objective.mode``. Such a class stands beside the code that reads it, and registers itself.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a value has to be, as a test and in words."""

    holds: Callable[[Any], bool]
    expected: str
    of_elements: bool = True  # of a tuple; or of the whole


# Numbers are finite: neither of these holds of what is none, nor of more than any number.
POSITIVE = Constraint(lambda value: 0 < value < float("inf"), "a finite number, more than zero")
ZERO_OR_MORE = Constraint(lambda value: 0 <= value < float("inf"), "a finite number, zero or more")


def at_least(bound: float, why: str = "") -> Constraint:
    """A lower bound, and what it is for."""
    return Constraint(lambda value: value >= bound, f"at least {bound}{why}")


def at_most(bound: float) -> Constraint:
    """An upper bound."""
    return Constraint(lambda value: value <= bound, f"at most {bound}")


def less_than(bound: float, words: str = "", why: str = "") -> Constraint:
    """An upper bound that is left out, how it is written, and what it is for."""
    return Constraint(lambda value: value < bound, f"less than {words or bound}{why}")


def given(what: str) -> Constraint:
    """A text or a tuple that may not be empty; ``what`` says what it holds."""
    return Constraint(lambda value: len(value) > 0, what, of_elements=False)


def one_of(known: Mapping[str, Any]) -> Constraint:
    """A name that something is registered under."""
    return Constraint(lambda value: value in known, f"one of {', '.join(known)}")


def field(default: Any, *constraints: Constraint, resumable: bool = False, as_before: Any = _MISSING) -> Any:
    """A field of a section.

    Args:
      default: its value where nobody says another.
      constraints: of a value that is not None.
      resumable: whether a run may go on with another value.
      as_before: of a field that runs were stored without, the value that means what they did. It stays what it is
        when the default changes.
    """
    metadata = {"constraints": constraints, "resumable": resumable, "as_before": as_before}
    return dataclasses.field(default=default, metadata=metadata)


def is_as_before(declared: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field that runs were stored without has the value that means what they did."""
    before = declared.metadata["as_before"]
    return before is not _MISSING and value == before


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that belong together.

    Subclasses with cases say what tells them apart, and which one it is where nothing is said, ``class
    ObjectiveConfig(Section, tag="mode", default="joint")``, and each case its tag's value, ``class
    JointConfig(ObjectiveConfig, case="joint")``; then ``config.objective.mode`` is that value.
    """

    tag: ClassVar[str] = ""
    case: ClassVar[str] = ""
    default_case: ClassVar[str] = ""
    cases: ClassVar[dict[str, type["Section"]]] = {}

    def __init_subclass__(cls, tag: str = "", default: str = "", case: str = "") -> None:
        if tag:
            cls.tag, cls.default_case, cls.cases = tag, default, {}
        if case:
            if not cls.tag or case in cls.cases:
                raise TypeError(f"{cls.__name__}: case {case!r} is taken, or of a section that has no cases")
            cls.case = case
            cls.cases[case] = cls
            setattr(cls, cls.tag, case)

    def to_dict(self) -> dict[str, Any]:
        """The tag, if there is one, and the fields, ready for JSON."""
        return {**({self.tag: self.case} if self.tag else {}), **dataclasses.asdict(self)}

    def check_fields(self, path: str) -> None:
        """Checks every value by itself.

        Raises:
          ValueError: naming the field, the value and what is allowed.
        """
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            for constraint in one.metadata["constraints"]:
                whole = not constraint.of_elements or not isinstance(value, tuple)
                for part in (value,) if whole else value:
                    require(part is None or constraint.holds(part), f"{path}.{one.name}", value, constraint.expected)

    def check(self, config: Any) -> None:
        """Checks values beside each other, and beside those of other sections; see ``Config.validate``."""


def check_section(tree: Any, path: str) -> None:
    """Raises ValueError unless something that should hold fields, or sections, is a mapping."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} = {tree!r}: expected a section with fields")


def require(condition: bool, path: str, value: Any, expected: str) -> None:
    """Raises ValueError unless a value is as expected; ``path`` is ``section.field``."""
    if not condition:
        raise ValueError(f"config.{path} = {value!r}: expected {expected}")


def _class_of(declared: type[Section], tree: Any, path: str, stored: bool) -> type[Section]:
    """The class of a section: the declared one, or that of its case; see ``read_section``.

    Raises:
      ValueError: there is no such case, or the tree is no section.
    """
    check_section(tree, path)
    if not declared.tag:
        return declared
    if stored and declared.tag not in tree:
        raise ValueError(f"{path}.{declared.tag} is missing")
    chosen = tree.get(declared.tag, declared.default_case)
    if not isinstance(chosen, str) or chosen not in declared.cases:
        raise ValueError(f"{path}.{declared.tag} = {chosen!r}: expected one of {', '.join(declared.cases)}")
    return declared.cases[chosen]


def read_section(declared: type[Section], tree: Any, path: str, stored: bool) -> Section:
    """Builds a section from a mapping.

    Args:
      declared: its class, or the class of its cases.
      tree: tag and fields.
      path: ``config.section``, for messages.
      stored: whether a run was stored so, perhaps by an earlier version: then a field that is not there has its
        ``as_before`` value, and those of other cases are left out. Else it has its default, and a field of another case
        may stand there only with its default, which says nothing.

    Raises:
      ValueError: a field is unknown, missing or of the wrong type.
    """
    cls = _class_of(declared, tree, path, stored)
    # Fields that this case has not say nothing, or are refused.
    types_of = typing.get_type_hints(cls)
    hints = {one.name: types_of[one.name] for one in dataclasses.fields(cls)}
    for name, value in tree.items():
        if name not in hints and name != cls.tag:
            _check_foreign(declared, cls, name, value, path, stored)
    # Fields that it has: given, or what they meant before they were there, or their defaults.
    values = {}
    for one in dataclasses.fields(cls):
        if one.name in tree:
            values[one.name] = _convert(tree[one.name], hints[one.name], f"{path}.{one.name}")
        elif stored:
            if one.metadata["as_before"] is _MISSING:
                raise ValueError(f"{path}.{one.name} is missing")
            values[one.name] = one.metadata["as_before"]
    return cls(**values)


def _check_foreign(declared: type[Section], cls: type[Section], name: str, value: Any, path: str, stored: bool) -> None:
    """Refuses a field that this case has not."""
    others = {case: other for case, other in declared.cases.items() if name in defaults_of(other)}
    if not others:
        names = [cls.tag] if cls.tag else []
        names += defaults_of(cls)
        raise ValueError(f"{path}.{name}: no such field; fields of {path} are {', '.join(names)}")
    # With a default it says nothing, and stays unread.
    if not stored and all(value != defaults_of(other)[name] for other in others.values()):
        cases = " or ".join(map(repr, others))
        raise ValueError(
            f"{path}.{name} = {value!r}: expected nothing with {path.removeprefix('config.')}.{cls.tag} = "
            f"{cls.case!r}: only {cases} reads it; leave it out (del {path}.{name})"
        )


def defaults_of(cls: type[Section]) -> dict[str, Any]:
    """The fields of a section's class, with their defaults."""
    return {one.name: one.default for one in dataclasses.fields(cls)}


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Accepts an int where a float is due and a list where a tuple is due; nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        # Config files write 1 for 1.0, and JSON has lists only.
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_convert(element, item, f"{path}[{index}]") for index, element in enumerate(value))
    raise ValueError(f"{path} = {value!r}: expected {type_words(hint)}")


def type_words(hint: Any) -> str:
    """What a field's type takes, in words."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(map(_name, options))


def _name(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(option))
    return "None" if option is type(None) else getattr(option, "__name__", str(option))


def flat(tree: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields ``section.field`` and value of a config's sections."""
    for section, fields in tree.items():
        for name, value in fields.items():
            yield f"{section}.{name}", value
