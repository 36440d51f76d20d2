"""Prefixes that clients have pinned: the quotas of their keys, and their time to live."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import uuid4

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import EngineDeadError
from jpaged.engine.prompts import TokensPrompt
from jpaged.llm import PinnedPrefix
from jpaged.server.admission import Admission, Demand
from jpaged.server.errors import ApiError, refusals
from jpaged.server.keys import ApiKey
from jpaged.server.settings import ServerSettings

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Prefix:
    """One pinned prefix.

    Args:
        prefix_id: its id.
        key: the key that pinned it.
        num_tokens: its tokens.
        num_blocks: blocks that it takes, if it shares none.
        ttl_s: seconds that it stays pinned.
        created: when it was pinned, in seconds since 1970.
        pinned: the pin; None while it is computed.
        timer: unpins it.
    """

    prefix_id: str
    key: ApiKey
    num_tokens: int
    num_blocks: int
    ttl_s: float
    created: float = field(default_factory=time)
    pinned: PinnedPrefix | None = None
    timer: asyncio.TimerHandle | None = None

    def card(self) -> dict[str, Any]:
        """The prefix as its owner sees it."""
        return {
            "id": self.prefix_id,
            "object": "prefix",
            "created": int(self.created),
            "expires": int(self.created + self.ttl_s),
            "tokens": self.num_tokens,
            "blocks": self.num_blocks,
        }


class Prefixes:
    """The prefixes that clients have pinned. A key sees and unpins its own alone.

    All methods are for the thread of the event loop.

    Args:
        llm: the engine.
        settings: the settings.
        admission: the queue before the engine, where a prefix waits as requests do.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, admission: Admission) -> None:
        self._llm = llm
        self._settings = settings
        self._admission = admission
        self._prefixes: dict[str, Prefix] = {}

    def owned_by(self, key: ApiKey) -> list[Prefix]:
        """The prefixes of a key that are in the pool, the oldest first."""
        return [each for each in self._prefixes.values() if each.key.name == key.name and each.pinned is not None]

    async def pin(self, key: ApiKey, token_ids: list[int], cache_salt: str | None, ttl_s: float | None) -> Prefix:
        """Compute a prefix and keep its KV in the pool.

        Raises:
            ApiError: 400 if it can never be pinned, 429 if a quota is used up.
        """
        longest_s = self._settings.max_prefix_ttl_s
        if ttl_s is not None and ttl_s > longest_s:
            raise ApiError(400, f"ttl={ttl_s:g} is not valid: expected at most {longest_s:g} seconds", param="ttl")
        num_blocks = -(-len(token_ids) // self._llm.engine.config.block_size)
        prefix = Prefix(f"prefix-{uuid4().hex}", key, len(token_ids), num_blocks, longest_s if ttl_s is None else ttl_s)
        self._check_quota(prefix)
        self._prefixes[prefix.prefix_id] = prefix  # it counts from now on
        try:
            await self._compute(prefix, token_ids, cache_salt)
        except BaseException:
            self._prefixes.pop(prefix.prefix_id, None)
            raise
        return prefix

    async def _compute(self, prefix: Prefix, token_ids: list[int], cache_salt: str | None) -> None:
        prompt: TokensPrompt = {"prompt_token_ids": token_ids}
        if (salt := prefix.key.cache_salt(cache_salt)) is not None:
            prompt["cache_salt"] = salt
        demand = Demand(prefix.prefix_id, len(token_ids), max_tokens=1, priority=prefix.key.priority(0))
        with self._admission.queue(prefix.key, [demand]) as [ticket], refusals():
            await ticket.turn
            prefix.pinned = await self._llm.pin_prefix(prompt)
        prefix.created = time()
        prefix.timer = asyncio.get_running_loop().call_later(prefix.ttl_s, self._expire, prefix)

    def _check_quota(self, prefix: Prefix) -> None:
        settings, of_key = self._settings, [p for p in self._prefixes.values() if p.key.name == prefix.key.name]
        if len(of_key) >= settings.max_prefixes:
            raise ApiError(
                429, f"this key has {len(of_key)} pinned prefixes: unpin one first", code="prefix_quota_exceeded"
            )
        num_tokens, most = sum(each.num_tokens for each in of_key), prefix.key.max_pinned_tokens
        if most is not None and num_tokens + prefix.num_tokens > most:
            raise ApiError(
                400 if prefix.num_tokens > most else 429,
                f"this key may pin {most} tokens: {num_tokens} are pinned, and this prefix has {prefix.num_tokens}",
                code="prefix_quota_exceeded",
            )
        most = int(self._llm.latest_stats.num_blocks * settings.max_pinned_fraction)
        num_blocks = sum(each.num_blocks for each in self._prefixes.values())
        if num_blocks + prefix.num_blocks > most:
            raise ApiError(
                400 if prefix.num_blocks > most else 429,
                f"prefixes may take {most} blocks: {num_blocks} are taken, and this one needs {prefix.num_blocks}",
                code="prefix_quota_exceeded",
            )

    def find(self, key: ApiKey, prefix_id: str) -> Prefix:
        """A prefix of a key.

        Raises:
            ApiError: 404, also for a prefix of another key.
        """
        prefix = self._prefixes.get(prefix_id)
        if prefix is None or prefix.key.name != key.name or prefix.pinned is None:
            raise ApiError(404, f"no prefix has the id {prefix_id[:128]!r}", code="prefix_not_found")
        return prefix

    async def unpin(self, prefix: Prefix) -> None:
        """Let a prefix go; its blocks stay in the prefix cache like any others."""
        self._prefixes.pop(prefix.prefix_id, None)
        if prefix.timer is not None:
            prefix.timer.cancel()
        assert prefix.pinned is not None, "only computed prefixes are found"
        with suppress(ValueError, EngineDeadError):  # the engine has let it go before
            await self._llm.unpin(prefix.pinned)

    def _expire(self, prefix: Prefix) -> None:
        _log.info("the time of %s is over", prefix.prefix_id)
        unpinning = asyncio.ensure_future(self.unpin(prefix))
        unpinning.add_done_callback(lambda done: done.exception())

    def close(self) -> None:
        """Forget the timers; the engine lets its pins go when it ends."""
        for prefix in self._prefixes.values():
            if prefix.timer is not None:
                prefix.timer.cancel()
