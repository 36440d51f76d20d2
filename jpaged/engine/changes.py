"""Changes that threads of the device half make while an engine serves."""

import logging
from collections.abc import Set

from jpaged.device.runner import ModelRunner
from jpaged.device.step.inputs import Bucket
from jpaged.host.blocks.manager import drop_host_tier
from jpaged.host.scheduler import Scheduler

log = logging.getLogger(__name__)


class Changes:
    """Tells a scheduler between two steps of sizes that were compiled, and of host memory that cannot be pinned.

    Args:
        runner: the device half.
        scheduler: its ``step_sizes`` and its host tier are written here.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pending: Set[Bucket] | None = None
        self.note()

    def note(self) -> None:
        """Take over the changes since the last call. Call it while no plan is being made."""
        pending = self._runner.programs.background.pending
        if pending is not self._pending:
            self._pending = pending
            sizes = self._runner.programs.usable_buckets()
            self._scheduler.step_sizes = tuple([(s.num_tokens, s.num_rows) for s in sizes if not s.is_decode])
        pool, blocks = self._runner.host_pool, self._scheduler.blocks
        if pool is not None and blocks.num_host_blocks and (error := pool.failure()) is not None:
            log.error("there is no host pool, and preempted requests are computed again: %s", error)
            drop_host_tier(blocks)
