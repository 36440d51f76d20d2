"""Rules of settings: type, valid values, default and help of each, written once, in the field that declares it."""

import inspect
import reprlib
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, Protocol


class Rule(NamedTuple):
    """Values that a setting may have.

    Args:
        type: type of one value, as a command line reads it.
        is_valid: whether a value is valid.
        expected: the valid values, in words.
        choices: the valid values, if they are few words.
    """

    type: type
    is_valid: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> None:
        """Check the value of a setting.

        Raises:
            ValueError: the value is not valid.
        """
        if not self.is_valid(value):
            raise ValueError(f"{name}={reprlib.repr(value)} is not valid: expected {self.expected}")


class Setting(NamedTuple):
    """One setting.

    Args:
        rule: the valid values.
        help: the meaning: words that go on after the name, with other settings in double backticks.
        unset: the meaning of the default where the value does not say it.
        name: the name, known once its class is made.
        default: the default; MISSING if the setting has to be given.
    """

    rule: Rule
    help: str
    unset: str = ""
    name: str = ""
    default: Any = MISSING

    @property
    def shown_default(self) -> str:
        """The default in words."""
        return self.unset or str(self.default)


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float that a float can hold, which is not true of 10**400."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def integer(least: int, most: int | None = None) -> Rule:
    """Integers of a range; without ``most`` it has no end."""
    expected = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most}"
    return Rule(int, lambda x: is_int(x) and least <= x and (most is None or x <= most), expected)


def number(least: float, most: float) -> Rule:
    """Numbers of a closed range."""
    return Rule(float, lambda x: is_number(x) and least <= x <= most, f"a number in [{least}, {most}]")


def number_above(least: float, most: float) -> Rule:
    """Numbers of a range that does not include ``least``."""
    return Rule(float, lambda x: is_number(x) and least < x <= most, f"a number in ({least}, {most}]")


def one_of(*choices: str) -> Rule:
    """One of a few words."""
    return Rule(str, lambda x: isinstance(x, str) and x in choices, "one of " + ", ".join(choices), choices)


FLAG = Rule(bool, lambda x: isinstance(x, bool), "True or False")


def optional(rule: Rule) -> Rule:
    """None, or what another rule says."""
    return rule._replace(is_valid=lambda x: x is None or rule.is_valid(x), expected=f"None or {rule.expected}")


def setting(default: Any, rule: Rule, help_: str, *, unset: str = "", **more: object) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        default: the default; MISSING for a setting that has to be given.
        rule: the valid values.
        help_: the meaning, see ``Setting``.
        unset: the meaning of the default, see ``Setting``.
        more: metadata that the class itself reads.
    """
    metadata = {"setting": Setting(rule, help_, unset), **more}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


class HasFields(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@cache
def settings_of(cls: type[HasFields]) -> dict[str, Setting]:
    """The settings of a dataclass by name, in the order of their fields."""
    pairs = [(each, each.metadata["setting"]) for each in fields(cls)]
    return {each.name: declared._replace(name=each.name, default=each.default) for each, declared in pairs}


def check_all(owner: HasFields) -> None:
    """Check every setting of a dataclass on its own.

    Raises:
        ValueError: a value is not valid, with the value and what was expected.
    """
    for name, each in settings_of(type(owner)).items():
        each.rule.check(name, getattr(owner, name))


def describe(doc: str | None, cls: type[HasFields]) -> str:
    """A docstring with the settings of a dataclass added to its Args."""
    text, mark, raises = inspect.cleandoc(doc or "").partition("\nRaises:")
    lines = [
        f"    {each.name}: {each.help}" + ("." if each.default is MISSING else f" (default: {each.shown_default}).")
        for each in settings_of(cls).values()
    ]
    head = text.rstrip() + ("" if "\nArgs:" in text else "\n\nArgs:")
    return "\n".join([head, *lines, mark + raises])


def documented[T](cls: type[T]) -> type[T]:
    """Add the settings of a dataclass to its docstring."""
    cls.__doc__ = describe(cls.__doc__, cls)  # pyright: ignore[reportArgumentType]
    return cls
