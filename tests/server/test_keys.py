"""API keys: files and the environment, limits, rotation, and no key in any message."""

import hashlib
import logging
import re
from pathlib import Path

import pytest

import jpaged
from jpaged.server.keys import ANONYMOUS, KEYS_VARIABLE, ApiKey, KeyRing

SECRET = "sk-a-secret-key"


def ring(tmp_path, text: str, environment: str = "") -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return KeyRing.load(path, {KEYS_VARIABLE: environment})


def name_of(keys: KeyRing, token: str) -> str | None:
    key = keys.find(token.encode())
    return None if key is None else key.name


def test_without_keys_the_ring_is_empty():
    keys = KeyRing.load(None, {})
    assert keys.is_empty
    assert keys.find(b"") is None
    assert ANONYMOUS.cache_salt(None) is None
    assert ANONYMOUS.cache_salt("x") == "x"
    assert ANONYMOUS.priority(-7) == -7


def test_keys_come_from_the_file_and_the_environment(tmp_path):
    digest = hashlib.sha256(b"sk-another-key").hexdigest()
    keys = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n[bob]\nsha256 = "{digest}"\n', "sk-number-0, sk-number-1")
    assert not keys.is_empty
    tokens = {SECRET: "alice", "sk-another-key": "bob", "sk-number-0": "env-0", "sk-number-1": "env-1"}
    assert {token: name_of(keys, token) for token in tokens} == tokens
    for wrong in ("", "sk-", SECRET[:-1], SECRET + "x", SECRET.upper(), digest, "ключ"):
        assert name_of(keys, wrong) is None


def test_a_key_is_not_kept(tmp_path):
    keys = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n')
    keys.environment = {}
    assert SECRET not in repr(keys)
    assert SECRET not in repr(keys._keys)
    assert repr(keys.find(SECRET.encode())).startswith("ApiKey(name='alice'")


def test_a_priority_has_a_floor(tmp_path):
    keys = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n[boss]\nkey = "sk-of-the-boss"\nmin_priority = -5\n')
    alice, boss = keys.find(SECRET.encode()), keys.find(b"sk-of-the-boss")
    assert alice is not None
    assert boss is not None
    assert [alice.priority(asked) for asked in (-9, 0, 3)] == [0, 0, 3]
    assert [boss.priority(asked) for asked in (-9, 0, 3)] == [-5, 0, 3]


def test_keys_and_salts_keep_cached_prompts_apart(tmp_path):
    keys = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n[bob]\nkey = "sk-another-key"\n')
    alice, bob = keys.find(SECRET.encode()), keys.find(b"sk-another-key")
    assert alice is not None
    assert bob is not None
    salts = [key.cache_salt(salt) for key in (alice, bob) for salt in (None, "x", "y")]
    assert len(set(salts)) == 6
    assert None not in salts
    assert keys.find(SECRET.encode()) == alice
    again = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n').find(SECRET.encode())
    assert again is not None
    assert again.salt != alice.salt  # no other process can guess a salt
    assert alice.salt not in repr(alice)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[alice]\n",
        "alice = 1",
        '[alice]\nkey = "short"',
        '[alice]\nkey = "sk-with space"',
        '[alice]\nkey = "sk-schlüssel"',
        "[alice]\nkey = 12345678",
        '[alice]\nsha256 = "abc"',
        '[alice]\nkey = "sk-a-secret-key"\nsha256 = "abc"',
        '[alice]\nkey = "sk-a-secret-key"\nlimit = 1',
        '[alice]\nkey = "sk-a-secret-key"\nweight = 0',
        '[alice]\nkey = "sk-a-secret-key"\nsalt = "mine"',
        '[alice]\nkey = "sk-a-secret-key"\nname = "bob"',
        '["al ice"]\nkey = "sk-a-secret-key"',
        '[alice]\nkey = "sk-a-secret-key"\n[bob]\nkey = "sk-a-secret-key"',
        '[alice]\nkey = "sk-a-secret-key',
    ],
)
def test_a_file_that_is_not_valid_is_refused_without_a_word_of_the_key(tmp_path, text):
    with pytest.raises(ValueError, match=r"key|entry|name|weight") as caught:
        ring(tmp_path, text)
    assert SECRET not in str(caught.value)
    assert "sk-" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        KeyRing.load(tmp_path / "absent.toml", {})


def test_keys_rotate(tmp_path, caplog):
    keys = ring(tmp_path, f'[alice]\nkey = "{SECRET}"\n')
    before = keys.find(SECRET.encode())
    (tmp_path / "keys.toml").write_text('[alice]\nkey = "sk-the-next-key"\nweight = 2\n')
    keys.reload()
    after = keys.find(b"sk-the-next-key")
    assert keys.find(SECRET.encode()) is None
    assert before is not None
    assert after is not None
    assert (after.salt, after.weight) == (before.salt, 2)
    for broken in ("", "[alice", '[alice]\nkey = "short"\n'):
        (tmp_path / "keys.toml").write_text(broken)
        with caplog.at_level(logging.ERROR):
            keys.reload()
        assert "the keys stay as they are" in caplog.text
        assert keys.find(b"sk-the-next-key") == after
    assert "sk-" not in caplog.text


def test_a_limit_out_of_range_is_refused():
    with pytest.raises(ValueError, match="requests_per_minute=0 is not valid"):
        ApiKey("alice", requests_per_minute=0)


def test_the_example_of_the_documents_is_valid(tmp_path):
    page = (Path(jpaged.__file__).parent / "docs/keys.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", page, re.S)
    alice = ring(tmp_path, example).find(b"sk-a-long-random-text")
    assert alice is not None
    assert (alice.weight, alice.tokens_per_minute) == (2, 200_000)
