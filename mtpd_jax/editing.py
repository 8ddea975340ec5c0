"""The configuration while it is edited, by config files and flags: an ml_collections ConfigDict with all its fields."""

import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from mtpd_jax.config import sections
from mtpd_jax.fields import defaults_of


def editable() -> ml_collections.ConfigDict:
    """Every field with its default, as config files and flags edit them; of sections with cases, the default one's."""
    tree = ml_collections.ConfigDict()
    fit_cases(tree, {})
    return tree


def chosen_cases(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of sections that changes (``section.field`` -> value) choose, as ``fit_cases`` takes them."""
    tags = {name: f"{name}.{section.tag}" for name, section in sections().items() if section.tag}
    return {name: changes[path] for name, path in tags.items() if path in changes}


def change(tree: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> None:
    """Sets fields of a config that is edited; those of a case are there once the case is among the changes.

    Args:
      tree: changed in place.
      changes: ``section.field`` -> value.

    Raises:
      ValueError: there is no such field.
    """
    fit_cases(tree, chosen_cases(changes))
    for path, value in changes.items():
        section, _, name = path.partition(".")
        check_name(tree, path)
        fields: Any = tree[section]
        fields[name] = value


def check_name(tree: ml_collections.ConfigDict, path: str) -> None:
    """Checks that a config that is edited has a field ``section.field``.

    Raises:
      ValueError: naming those that there are.
    """
    section, _, name = path.partition(".")
    if section not in tree:
        raise ValueError(f"config.{path}: there is no section {section!r}; sections are {', '.join(tree)}")
    fields: Any = tree[section]
    if name not in fields:
        raise ValueError(f"config.{path}: no such field; fields of config.{section} are {', '.join(fields)}")


def fit_cases(tree: ml_collections.ConfigDict, chosen: Mapping[str, str]) -> None:
    """Gives every section of a config that is edited the fields of its case.

    Fields that are missing are added with their defaults. Those of another case go if they have their defaults, or if
    the case is chosen here; else they stay, to be refused.

    Args:
      tree: changed in place.
      chosen: section -> case, where it is to have another.

    Raises:
      ValueError: a section has no such case.
    """
    for name, declared in sections().items():
        section: Any = tree.get(name, ml_collections.ConfigDict())
        if not isinstance(section, ml_collections.ConfigDict):
            continue  # and is refused when it is built
        # The case that is asked for, or is there, or is the default.
        case: Any = chosen.get(name, section.get(declared.tag or "", declared.default_case))
        if declared.tag and (not isinstance(case, str) or case not in declared.cases):
            raise ValueError(f"config.{name}.{declared.tag} = {case!r}: expected one of {', '.join(declared.cases)}")
        cls = declared.cases[case] if declared.tag else declared
        hints = typing.get_type_hints(cls)
        # What belongs to other cases goes, unless somebody has changed it.
        foreign = {key: value for other in declared.cases.values() for key, value in defaults_of(other).items()}
        with section.unlocked():
            for key, default in foreign.items():
                if key in section and key not in defaults_of(cls) and (name in chosen or section[key] == default):
                    del section[key]
            if declared.tag:
                section[declared.tag] = case
            for key, default in defaults_of(cls).items():
                if key not in section:
                    section[key] = _entry(default, hints[key])
        if name not in tree:
            with tree.unlocked():
                tree[name] = section


def _entry(default: Any, hint: Any) -> Any:
    """A default in the form in which ml_collections lets it be replaced by every type that the field may have."""
    options = typing.get_args(hint)
    if type(None) not in options:
        return default
    # ml_collections replaces a value by one of the same type alone, unless it is told otherwise.
    if default is not None:
        return config_dict.FieldReference(default, field_type=object)
    types = [option for option in options if option is not type(None)]
    return config_dict.placeholder(types[0] if len(types) == 1 else object)
