"""Starts what commands need: the LLM, and the other processes that share it."""

import argparse
import sys
from typing import TYPE_CHECKING

from jpaged.cli.options import engine_settings

if TYPE_CHECKING:
    from jpaged.llm import LLM

MAX_BATCHED_TOKENS = 512
"""Most tokens of a step: prompts are computed in pieces, so that one short command compiles small programs only."""


class Followed(Exception):
    """This process did what the leading one decided, which is all that it had to do."""


def load(args: argparse.Namespace, *, max_num_seqs: int) -> "LLM":
    """The LLM that the options ask for. Each program is compiled when it is first needed: a command needs few.

    Raises:
        Followed: another process leads, and has ended.
    """
    from jpaged.llm import LLM

    llm = LLM(
        args.model,
        max_num_seqs=max_num_seqs,
        # A block of a prompt fits beside the decodes, as 8-bit pools need.
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_num_seqs + args.block_size),
        enable_prefix_caching=not args.no_prefix_caching,
        warm_up=False,
        use_tqdm=sys.stderr.isatty(),
        **engine_settings(args),
    )
    if not llm.is_leader:
        llm.follow()
        raise Followed
    return llm


def join(args: argparse.Namespace) -> None:
    """Bring this process together with the others; ``args`` then says whether it leads."""
    import jax

    from jpaged.device.processes import join_processes

    join_processes(args.coordinator_address, args.num_processes, args.process_id)
    args.is_leader = jax.process_index() == 0
