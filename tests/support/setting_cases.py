"""Tables of the values of settings, as the cases of a test."""

from typing import Any

import pytest


def cases(table: dict[str, list]) -> list[Any]:
    """One case for each value of each name."""
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in table.items() for value in values]
