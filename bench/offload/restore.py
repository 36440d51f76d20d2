"""Restore: the time in which a preempted request gets its KV back, by transfer, by computation, and by both."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from bench.offload.shapes import BLOCK_SIZE, Shapes, settings_of
from bench.report import Table
from bench.serving.runs import as_prompts
from bench.serving.stopwatch import replaced
from jpaged import EngineConfig, SamplingParams
from jpaged.contract.profile import MachineProfile
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.host.sequence import SequenceGroup

WAYS = {"swap": "swap", "recompute": "recompute", "both": "swap", "auto": "auto"}
"""Way back -> the engine's ``preemption``. "swap" has no profile, so that it transfers all."""

HIGH, LOW = 0, 1
"""Priorities. The request of low priority is the one that is preempted."""

NUM_BETWEEN = 4  # tokens between two preemptions
OTHER_LEN = 16  # tokens of the prompt that preempts
NUM_OF_OTHER = 8  # tokens that it draws: copies to the host end in the meantime
DECODE_LEN, NUM_DECODED = 256, 256  # tokens of each prompt beside, and tokens that it may draw
BATCHED_TOKENS = 8192
MOST_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class Restore:
    """One restore.

    Args:
        restore_ms: from the plan that admits the request again to its next token.
        yield_ms: from the arrival of the other request to its first token.
        longest_step_ms: longest iteration of the restore, which all decodes beside wait for.
        num_recomputed_tokens: tokens that the plan of a transfer computes instead.
        num_swaps_in: 1 if the request came back from the host, 0 if all was computed again.
        bytes_from_host: bytes transferred.
        num_programs_compiled: programs compiled in the meantime; any number but 0 spoils the times.
    """

    restore_ms: float
    yield_ms: float
    longest_step_ms: float
    num_recomputed_tokens: int
    num_swaps_in: int
    bytes_from_host: int
    num_programs_compiled: int


def add_options(group: Any) -> None:
    """Add the options of this scenario."""
    lengths = "tokens of the preempted request (default: 1024 8192; 512 with the model in the box)"
    group.add_argument("--lengths", nargs="+", type=int, metavar="N", help=lengths)
    decodes = "decodes beside it, a row for each number (default: 0 64)"
    group.add_argument("--decodes", nargs="+", type=int, default=[0, 64], metavar="N", help=decodes)
    group.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways back (default: all)")


def measure(args: Namespace, shapes: Shapes) -> None:
    """Measure all lengths, ways and numbers of decodes."""
    args.lengths = shapes.choose_lengths(args.lengths, [1024, 8192])
    longest, num_beside = max(args.lengths) + _num_own(args.repeats), max(args.decodes)
    max_model_len = max(longest, DECODE_LEN + NUM_DECODED)
    shapes = shapes.with_context(max_model_len)
    num_own_blocks = -(-longest // BLOCK_SIZE)
    num_blocks = num_own_blocks + num_beside * -(-(DECODE_LEN + NUM_DECODED) // BLOCK_SIZE)
    config = EngineConfig(
        num_blocks=num_blocks + num_blocks // 20 + 16,
        num_host_blocks=num_own_blocks + 16,
        max_num_seqs=num_beside + 1,
        max_num_batched_tokens=args.max_num_batched_tokens or BATCHED_TOKENS,
        max_model_len=max_model_len,
        kv_cache_dtype=args.kv_cache_dtype,
        enable_prefix_caching=False,
        max_burst=1,
    )
    llm = shapes.start(config)
    runner = llm.engine.runner
    assert runner.profile is not None, "preemption='auto' measures it"
    print(f"{shapes.name}: {runner.bytes_per_block:,} bytes a block, profile {asdict(runner.profile)}\n")
    table = Table("ms to the next token", *args.ways, "both/best", "tokens", "equal", first=24)
    print(table.header())
    results = []
    for length in args.lengths:
        for num_decodes in args.decodes:
            result = _measure_row(args, shapes, runner, config, length, num_decodes)
            results.append(result)
            print(table.row(f"{length:,} beside {num_decodes}", *_cells(result)), flush=True)
            args.keep(settings_of(llm) | {"profile": asdict(runner.profile), "restores": results})


def _measure_row(
    args: Namespace, shapes: Shapes, runner: ModelRunner, config: EngineConfig, length: int, num_decodes: int
) -> dict[str, Any]:
    """Measure all ways of one length beside one number of decodes."""
    ways, token_ids = {}, {}
    for way in args.ways:
        engine = Engine(runner, replace(config, preemption=WAYS[way], max_num_seqs=num_decodes + 1))
        if way == "swap":
            engine.scheduler.profile = None
        rounds, drawn = _Rounds(engine, shapes).run(length, num_decodes, args.repeats)
        token_ids[way] = drawn
        clean = [each for each in rounds if each.num_programs_compiled == 0] or rounds
        ways[way] = {
            "restore_ms": median(each.restore_ms for each in clean),
            "yield_ms": median(each.yield_ms for each in clean),
            "longest_step_ms": median(each.longest_step_ms for each in clean),
            "num_recomputed_tokens": median(each.num_recomputed_tokens for each in clean),
            "rounds": [asdict(each) for each in rounds],
            "profile": _as_dict(engine.scheduler.profile),
        }
    differences = first_differences(token_ids)
    singles = [ways[way]["restore_ms"] for way in ("swap", "recompute") if way in ways]
    has_ratio = "both" in ways and len(singles) == 2
    return {
        "num_tokens": length,
        "num_decodes": num_decodes,
        "ways": ways,
        "gain_of_both": min(singles) / ways["both"]["restore_ms"] if has_ratio else None,
        "num_tokens_compared": min(map(len, token_ids.values())),
        "are_tokens_equal": not differences,
        "first_differences": differences,
    }


def first_differences(token_ids: dict[str, list[int]]) -> dict[str, int]:
    """The position from which a way's output differs from that of the first way, for each way that differs.

    Args:
        token_ids: output of each way. Outputs are compared as far as all of them go.
    """
    shortest = min(map(len, token_ids.values()))
    first, *others = token_ids
    found = {}
    for way in others:
        pairs = zip(token_ids[first][:shortest], token_ids[way], strict=False)
        position = next((position for position, (expected, got) in enumerate(pairs) if expected != got), None)
        if position is not None:
            found[way] = position
    return found


def _cells(result: dict[str, Any]) -> list[Any]:
    ways = result["ways"]
    recomputed = ways["both"]["num_recomputed_tokens"] if "both" in ways else None
    differences = (f"{way} from {position}" for way, position in result["first_differences"].items())
    equal = "yes" if result["are_tokens_equal"] else f"NO: {', '.join(differences)}"
    return [*(each["restore_ms"] for each in ways.values()), result["gain_of_both"], recomputed, equal]


def _as_dict(profile: MachineProfile | None) -> dict[str, Any] | None:
    return None if profile is None else asdict(profile)


def _most_rounds(repeats: int) -> int:
    """Most preemptions of one request: some rounds compile programs, and do not count."""
    return 2 * repeats + 2


def _num_own(repeats: int) -> int:
    """Tokens that the preempted request may draw: two in a plan each time that it stops and starts."""
    return (NUM_BETWEEN + 2) * (_most_rounds(repeats) + 1)


def _num_clean(rounds: list[Restore]) -> int:
    return sum(each.num_programs_compiled == 0 for each in rounds)


class _Rounds:
    """One request that is preempted again and again, perhaps beside decodes, in an engine of their own."""

    def __init__(self, engine: Engine, shapes: Shapes) -> None:
        self._engine = engine
        self._shapes = shapes
        self._num_requests = 0

    def run(self, length: int, num_decodes: int, repeats: int) -> tuple[list[Restore], list[int]]:
        """Preempt until enough rounds compiled nothing.

        Returns:
            All rounds but the first, and the tokens of the request that was preempted.
        """
        beside = [self._add(DECODE_LEN, NUM_DECODED, HIGH) for _ in range(num_decodes)]
        self._run_until(lambda: all(_num_drawn(group) > 0 for group in beside))
        group = self._add(length, _num_own(repeats), LOW)
        rounds: list[Restore] = []
        while len(rounds) < _most_rounds(repeats) and _num_clean(rounds[1:]) < repeats:
            target = _num_drawn(group) + NUM_BETWEEN
            self._run_until(lambda target=target: _num_drawn(group) >= target)
            rounds.append(self._preempt_and_restore(group))
        if not all(each.unfinished for each in (group, *beside)):
            raise RuntimeError(f"a request ended within {len(rounds)} rounds: --repeats {repeats} is too many")
        token_ids = group.sequences[0].output_token_ids
        for each in (group, *beside):
            self._engine.abort(each.request.request_id)
        self._engine.step()  # takes the step in flight
        return rounds[1:], token_ids

    def _preempt_and_restore(self, group: SequenceGroup) -> Restore:
        engine, num_programs = self._engine, len(self._engine.runner.programs)
        before, arrived = engine.stats(), time.perf_counter()
        other = self._add(OTHER_LEN, NUM_OF_OTHER, HIGH)
        self._run_until(lambda: _num_drawn(other) > 0)
        yielded_s = time.perf_counter() - arrived
        if group in engine.scheduler.line.running:
            raise RuntimeError("the request was not preempted")
        num_drawn = _num_drawn(group)
        with _admissions(engine, group) as admitted:
            longest_s = self._run_until(lambda: _num_drawn(group) > num_drawn, admitted)
        restored_s = time.perf_counter() - admitted[0]
        after = engine.stats()
        return Restore(
            restore_ms=1e3 * restored_s,
            yield_ms=1e3 * yielded_s,
            longest_step_ms=1e3 * longest_s,
            num_recomputed_tokens=after.num_restored_by_recompute - before.num_restored_by_recompute,
            num_swaps_in=after.num_swaps_in - before.num_swaps_in,
            bytes_from_host=after.bytes_from_host - before.bytes_from_host,
            num_programs_compiled=len(engine.runner.programs) - num_programs,
        )

    def _add(self, num_tokens: int, max_tokens: int, priority: int) -> SequenceGroup:
        """Add a greedy request of random tokens, which depend on its number in this engine."""
        self._num_requests += 1
        name = str(self._num_requests)
        [prompt] = as_prompts([self._shapes.prompt(num_tokens, self._num_requests)])
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(self._engine.make_request(name, prompt, params, priority), is_streamed=False)
        return self._engine.scheduler.roster.requests[name]

    def _run_until(self, is_done: Callable[[], bool], admitted: list[float] | None = None) -> float:
        """Step until a condition holds. Returns the longest step, of those that end after the admission."""
        longest_s = 0.0
        for _ in range(MOST_STEPS):
            if is_done():
                return longest_s
            started = time.perf_counter()
            self._engine.step()
            if admitted:
                longest_s = max(longest_s, time.perf_counter() - started)
        raise RuntimeError(f"no end after {MOST_STEPS:,} steps")


@contextmanager
def _admissions(engine: Engine, group: SequenceGroup) -> Iterator[list[float]]:
    """Note when the planning began that admits a group: the list gets one time."""
    admitted: list[float] = []

    def noting(plan: Callable[[], Any]) -> Callable[[], Any]:
        def planned() -> Any:
            started = time.perf_counter()
            made = plan()
            if not admitted and group in engine.scheduler.line.running:
                admitted.append(started)
            return made

        return planned

    with ExitStack() as stack:
        for method in ("schedule", "schedule_ahead"):
            stack.enter_context(replaced(engine.scheduler, method, noting(getattr(engine.scheduler, method))))
        yield admitted


def _num_drawn(group: SequenceGroup) -> int:
    return group.sequences[0].num_outputs
