"""API keys: who may ask, under which limits, and the salt that keeps the cached KV of keys apart."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from jpaged.rules import Rule, check_all, documented, integer, optional, setting

KEYS_VARIABLE = "JPAGED_API_KEY"
"""Environment variable with one key, or several that commas separate."""

LEAST_KEY_LEN = 8
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = optional(integer(1))

_log = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, or all callers of a server without keys.

    Raises:
        ValueError: a limit out of range.
    """

    name: str = setting(
        MISSING,
        Rule(str, lambda x: isinstance(x, str) and _NAME.fullmatch(x) is not None, "1 to 64 of A-Z a-z 0-9 _ . -"),
        "name in logs, which is no secret",
    )
    min_priority: int = setting(
        0, integer(MIN_PRIORITY, MAX_PRIORITY), "least priority of its requests; lower is served first"
    )
    weight: int = setting(1, integer(1, 1000), "share of the service when several keys wait")
    max_sequences: int | None = setting(
        None, _LIMIT, "sequences that may wait and run at once", unset="what the queue holds"
    )
    requests_per_minute: int | None = setting(None, _LIMIT, "requests a minute", unset="no limit")
    tokens_per_minute: int | None = setting(None, _LIMIT, "tokens of prompts and outputs a minute", unset="no limit")
    max_pinned_tokens: int | None = setting(
        None, _LIMIT, "tokens of the prefixes that it may pin", unset="what the server has for all"
    )
    salt: str = setting("", Rule(str, lambda x: isinstance(x, str), "a string"), "salt of its prefixes, made here")

    def __post_init__(self) -> None:
        check_all(self)

    def __repr__(self) -> str:
        return f"ApiKey(name={self.name!r})"  # the salt is a secret

    def priority(self, asked: int) -> int:
        """The priority that a request gets which asks for one."""
        return max(asked, self.min_priority)

    def cache_salt(self, client_salt: str | None) -> str | None:
        """The salt of a request's cached KV: keys never share blocks, nor do different salts of one key."""
        if not self.salt:
            return client_salt
        return self.salt if client_salt is None else f"{self.salt}:{client_salt}"


ANONYMOUS = ApiKey("anonymous", min_priority=MIN_PRIORITY)
"""Callers of a server without keys."""


@dataclass(slots=True)
class KeyRing:
    """The keys of a server. Its only writer is ``reload``.

    Only digests are kept. Under a name, the salt of cached KV stays the same when the key is changed.

    Args:
        path: a TOML file, with a table for each key; see ``docs/keys.md``.
        environment: variables, of which ``KEYS_VARIABLE`` is read.
    """

    path: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _keys: list[tuple[bytes, ApiKey]] = field(default_factory=list, repr=False)

    @classmethod
    def load(cls, path: str | Path | None, environment: Mapping[str, str] | None = None) -> Self:
        """Read the keys.

        Args:
            path: the file of keys; None is none.
            environment: variables; None is those of the process.

        Raises:
            ValueError: a file that cannot be read, or an entry that is not valid. No message has a key in it.
        """
        ring = cls(None if path is None else Path(path), os.environ if environment is None else environment)
        ring._keys = ring._read()
        return ring

    @property
    def is_empty(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    def find(self, token: bytes) -> ApiKey | None:
        """The key that a token is, in a time that does not depend on the token; None if there is none."""
        digest, found = hashlib.sha256(token).digest(), None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def reload(self) -> None:
        """Read the keys again; requests under way keep what they have. After an error, the keys stay as they are."""
        try:
            keys = self._read()
            if bool(keys) != bool(self._keys):
                raise ValueError("a running server neither gets its first key nor loses its last: restart it")
        except ValueError as error:
            _log.error("the keys stay as they are: %s", error)
            return
        self._keys = keys
        _log.info("%d keys are read", len(keys))

    def _read(self) -> list[tuple[bytes, ApiKey]]:
        found = _from_environment(self.environment.get(KEYS_VARIABLE, ""))
        if self.path is not None:
            found += _from_file(self.path)
        for what, values in (("name", [key.name for _, key in found]), ("key", [digest for digest, _ in found])):
            if len(set(values)) < len(values):
                raise ValueError(f"the same {what} is there twice: give each {what} once")
        return [(digest, replace(key, salt=self._salt(key.name))) for digest, key in found]

    def _salt(self, name: str) -> str:
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()


def _from_environment(text: str) -> list[tuple[bytes, ApiKey]]:
    tokens = [token for part in text.split(",") if (token := part.strip())]
    return [(_digest(KEYS_VARIABLE, token), ApiKey(f"env-{i}")) for i, token in enumerate(tokens)]


def _from_file(path: Path) -> list[tuple[bytes, ApiKey]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the file of keys {str(path)!r} cannot be read: {_reason(error)}") from None
    if not tables:
        raise ValueError(f"the file of keys {str(path)!r} has no key: give a table for each, with its name")
    return [_from_table(name, table) for name, table in tables.items()]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _from_table(name: str, table: Any) -> tuple[bytes, ApiKey]:
    expected = "key or sha256, and limits"
    if not isinstance(table, dict) or ("key" in table) == ("sha256" in table):
        raise ValueError(f"the entry {name!r} of the keys is not valid: expected a table with {expected}")
    limits = dict(table)
    token, digest = limits.pop("key", None), limits.pop("sha256", None)
    if unknown := limits.keys() - {each for each in ApiKey.__slots__ if each not in ("name", "salt")}:
        raise ValueError(f"the entry {name!r} of the keys has {sorted(unknown)}: expected {expected}")
    if digest is not None:
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest.lower()) is None:
            raise ValueError(f"sha256 of the entry {name!r} is not valid: expected 64 hexadecimal digits")
        return bytes.fromhex(digest), ApiKey(name, **limits)
    return _digest(name, token), ApiKey(name, **limits)


def _digest(where: str, token: Any) -> bytes:
    """The digest of a key in clear; the errors do not show the key."""
    is_valid = isinstance(token, str) and len(token) >= LEAST_KEY_LEN and token.isascii() and token.isprintable()
    if not is_valid or " " in token:
        raise ValueError(f"a key of {where} is not valid: expected {LEAST_KEY_LEN} ASCII characters or more, no spaces")
    return hashlib.sha256(token.encode()).digest()
