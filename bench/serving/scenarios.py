"""The workloads: each is a function that adds its figures to a ``Bench``."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import workloads
from bench.serving.clock import BREAKDOWN, PREPARATION, TIMED, TimeIsUp
from bench.serving.figures import host_line
from bench.serving.profiling import profile_prefill, time_decode
from bench.serving.runs import Bench, Run, sampling
from bench.serving.sizes import WORKLOADS
from bench.workloads import Workload, uniform
from jpaged import BeamSearchParams
from jpaged.device.step.programs import kept_programs

WARM_UP_ROWS, WARM_UP_LEN = 32, 8
"""Size of the short run before a timed one, which loads the programs of forks and swaps."""

WARM_UP_BLOCKS, WARM_UP_PRESSED_ROWS, WARM_UP_PRESSED_LEN = 257, 64, 48
"""A pool so small that these requests preempt each other."""

BEAM_WIDTH = 4


def run_workload(name: str, bench: Bench, options: Any) -> None:
    """Run one workload.

    Args:
        name: one of ``WORKLOADS``.
        bench: the runner, and the figures to fill.
        options: decode_batches, preemption, profile, no_breakdown (see ``python -m bench serving --help``).

    Raises:
        TimeIsUp: the workload took too long, and a figure is missing.
    """
    bench.start_clock()
    try:
        _RUNS[name](bench, options)
    finally:
        bench.figures.add_seconds(name, bench.clock.summary())


def _sharegpt(bench: Bench, _: Any) -> None:
    _throughput(bench, _sharegpt_name(bench), _sharegpt_work(bench))


def _few_shots(bench: Bench, _: Any) -> None:
    _shared_prefix(bench, bench.sizes.num_shared_prefix, 341)


def _system_prompt(bench: Bench, _: Any) -> None:
    _shared_prefix(bench, bench.sizes.num_system_prompt, 4096)


def _shared_prefix(bench: Bench, count: int, prefix_len: int) -> None:
    prefix_len //= bench.sizes.length_divisor
    work = _cut(workloads.shared_prefix(count, prefix_len, vocab_size=bench.vocab_size), bench)
    name = f"sharedprefix{prefix_len}_{count}"
    with bench.clock.part(PREPARATION):
        if _make_shared(bench, prefix_len, len(work.prompts), name):
            # Their first runs also load them and record their CUDA graphs.
            bench.run(bench.llm(), work.prompts, [sampling(max_tokens=length) for length in work.output_lens])
    _throughput(bench, name, work, unit="requests")


def _make_shared(bench: Bench, prefix_len: int, num_requests: int, name: str) -> int:
    """Make the programs with which so many requests read their prefix once. An engine makes them in the background.

    Returns:
        The number of programs: those of all sizes that the requests pass through, from the most rows to the last
        rows that still save enough.
    """
    programs, most_rows = bench.runner.programs, min(num_requests, bench.config.most_rows)
    decodes = sorted(bucket for bucket in programs.buckets if bucket.is_decode)
    largest = next((bucket for bucket in decodes if bucket.num_rows >= most_rows), decodes[-1])
    sizes = [size for size in decodes if size <= largest]
    keys = [("shared", size) for size in sizes if (size.num_rows - 1) * prefix_len >= programs.least_shared_tokens]
    left = [key for key in keys if key not in programs.store.programs]
    if left:
        rows = ", ".join(str(size.num_rows) for _, size in left)
        print(f"{name}: makes the programs that read a prefix once, for {rows} rows", flush=True)
        programs.store.make_all(left, kept_programs(programs), use_tqdm=False)
    return len(keys)


def _parallel(bench: Bench, _: Any) -> None:
    count = bench.sizes.num_parallel
    work = _cut(workloads.sharegpt(count, 6, vocab_size=bench.vocab_size), bench)
    _throughput(bench, f"parallel4_{count}", work, n=4)


def _beams(bench: Bench, _: Any) -> None:
    """Beam searches, beside samples of the same prompts: plain decoding of as many rows.

    The beginning of the same work runs before each, since its steps have the shapes of the timed ones.
    """
    count, length = bench.sizes.num_beam_prompts, bench.sizes.beam_len
    prompts = _cut(workloads.sharegpt(count, 7, vocab_size=bench.vocab_size), bench).prompts

    def timed(make_params: Callable[[int], Any]) -> Run:
        with bench.clock.part(PREPARATION):
            bench.run(bench.llm(), prompts, make_params(min(length, 2 * WARM_UP_LEN)))
            llm = bench.llm()
        with bench.clock.part(TIMED):
            return bench.run_to_the_end(llm, prompts, make_params(length))

    plain = timed(lambda length: sampling(max_tokens=length, n=BEAM_WIDTH))
    run = timed(lambda length: BeamSearchParams(BEAM_WIDTH, length, ignore_eos=True).to_sampling_params())
    assert run.num_output_tokens == plain.num_output_tokens == count * BEAM_WIDTH * length
    of_plain = 100 * run.tokens_per_s / plain.tokens_per_s
    bench.figures.add(
        f"beam{BEAM_WIDTH}_{count}x{length}_tokens_per_s",
        run.tokens_per_s,
        lower_is_better=False,
        **_floors_per_s(bench, run, run.num_output_tokens),
        **asdict(run),
        of_plain_percent=of_plain,
        plain_tokens_per_s=plain.tokens_per_s,
        plain=asdict(plain),
    )
    print(
        f"  {of_plain:.0f}% of plain decoding ({plain.tokens_per_s:,.0f} tokens/s: {BEAM_WIDTH} samples a prompt); "
        f"{run.saved_by_sharing_percent:.1f}% of the blocks saved by sharing, plain "
        f"{plain.saved_by_sharing_percent:.1f}%{run.note() or plain.note()}\n  {host_line(run.host_us_per_step)}"
    )


def _under_pressure(bench: Bench, options: Any) -> None:
    """The ShareGPT work in a small pool, against the same engine with its whole pool."""
    name, num_blocks = _sharegpt_name(bench), bench.sizes.num_pressure_blocks
    figures = bench.figures.report["figures"]
    if f"{name}_tokens_per_s" not in figures:
        _sharegpt(bench, options)
    unconstrained = figures[f"{name}_tokens_per_s"]
    work, title = _sharegpt_work(bench), f"{name}_{num_blocks}blocks"
    params = [sampling(max_tokens=length) for length in work.output_lens]
    for preemption in options.preemption:
        bench.clock.extend()
        with bench.clock.part(PREPARATION):
            pressed = bench.llm(num_blocks=min(WARM_UP_BLOCKS, 1 + num_blocks), preemption=preemption)
            _warm_up(bench, pressed, work, WARM_UP_PRESSED_ROWS, WARM_UP_PRESSED_LEN)
            llm = bench.llm(num_blocks=1 + num_blocks, preemption=preemption)  # block 0 is for padding
        with bench.clock.part(TIMED):
            run = bench.run(llm, work.prompts, params)
        bench.figures.add(
            f"{title}_{preemption}_tokens_per_s",
            run.tokens_per_s,
            lower_is_better=False,
            **_floors_per_s(bench, run, run.num_output_tokens),
            peer_name=f"{title}_tokens_per_s",
            profile=None if bench.runner.profile is None else asdict(bench.runner.profile),
            **asdict(run),
        )
        if run.is_complete and unconstrained["is_complete"]:  # parts of the work would differ in their lengths
            bench.figures.add(
                f"{title}_{preemption}_kept_percent",
                100 * run.tokens_per_s / unconstrained["value"],
                lower_is_better=False,
                peer_name=f"{title}_kept_percent",
                unconstrained_tokens_per_s=unconstrained["value"],
            )
        print(
            f"  {run.num_preemptions:,} preemptions, {run.num_swaps_out:,} swaps out and {run.num_swaps_in:,} in; "
            f"{run.bytes_to_host / 2**30:.3g} GiB to the host and {run.bytes_from_host / 2**30:.3g} GiB back; "
            f"{run.transfer_stalled_s:.2f} of {run.elapsed_s:.1f} s stalled{run.note()}\n"
            f"  {host_line(run.host_us_per_step)}"
        )


def _decode(bench: Bench, options: Any) -> None:
    """Time of a step in which all requests decode, and its breakdown."""
    llm, sizes = bench.llm(), bench.sizes
    for batch in options.decode_batches:
        with bench.clock.part(PREPARATION):
            prompts, name = _fresh_prompts(bench, batch, batch), f"decode_{batch}"
        num_traced = 0 if options.no_breakdown else sizes.num_traced_steps
        times = time_decode(llm, prompts, sizes.num_decoded, num_traced, _trace_path(options, name), bench.clock)
        bench.figures.add(
            f"{name}_ms",
            times.step_us / 1e3,
            lower_is_better=True,
            floor=1e3 * bench.floor.decode_s(batch, sizes.prompt_len + sizes.num_decoded // 2),
            num_programs_compiled=times.num_programs_compiled,
            host_us_per_step=times.host_us,
        )
        if times.breakdown is not None:
            bench.figures.add_step(name, times.breakdown)


def _prefill(bench: Bench, options: Any) -> None:
    """Prompts that are not cached, one token each. Then the breakdown of a step."""
    llm, sizes = bench.llm(), bench.sizes
    with bench.clock.part(PREPARATION):
        works = [_fresh_prompts(bench, sizes.num_prefill, seed) for seed in (100, 101)]
    with bench.clock.part(TIMED):
        runs = [bench.run_to_the_end(llm, prompts, sampling(max_tokens=1)) for prompts in works]
    best = min(runs, key=lambda run: run.elapsed_s)
    bench.figures.add(
        f"prefill{sizes.num_prefill}_s",
        best.elapsed_s,
        lower_is_better=True,
        floor=bench.floor.compute_s(sizes.num_prefill * sizes.prompt_len),
        num_programs_compiled=best.num_programs_compiled,
        host_us_per_step=best.host_us_per_step,
    )
    if options.no_breakdown:
        return
    with bench.clock.part(BREAKDOWN):
        per_step = bench.config.token_budget / sizes.prompt_len
        timed, traced = (
            _fresh_prompts(bench, max(1, int(num_steps * per_step)), seed)
            for num_steps, seed in ((sizes.num_timed_steps, 102), (sizes.num_traced_steps // 2, 103))
        )
        bench.figures.add_step("prefill", profile_prefill(llm, timed, traced, _trace_path(options, "prefill")))


_IN_ORDER = (
    _sharegpt, _decode, _prefill, _few_shots, _system_prompt, _parallel, _beams, _under_pressure,
)  # fmt: skip
_RUNS: dict[str, Callable[[Bench, Any], None]] = dict(zip(WORKLOADS, _IN_ORDER, strict=True))


def _throughput(bench: Bench, name: str, work: Workload, *, n: int = 1, unit: str = "tokens") -> None:
    with bench.clock.part(PREPARATION):
        _warm_up(bench, bench.llm(), work, WARM_UP_ROWS // n, WARM_UP_LEN, n)
        llm = bench.llm()
    with bench.clock.part(TIMED):
        run = bench.run(llm, work.prompts, [sampling(max_tokens=length, n=n) for length in work.output_lens])
    done = run.num_requests if unit == "requests" else run.num_output_tokens
    if not done:
        raise TimeIsUp
    bench.figures.add(
        f"{name}_{unit}_per_s",
        done / run.elapsed_s,
        lower_is_better=False,
        **_floors_per_s(bench, run, done),
        **asdict(run),
    )
    cached, total = run.num_cached_prompt_tokens, max(run.num_prompt_tokens, 1)
    print(
        f"  {run.saved_by_sharing_percent:.1f}% of the blocks saved by sharing; {cached:,} of {total:,} prompt tokens "
        f"({100 * cached / total:.0f}%) from the prefix cache{run.note()}\n  {host_line(run.host_us_per_step)}"
    )


def _floors_per_s(bench: Bench, run: Run, done: int) -> dict[str, float]:
    """The rates if steps took no more time than their bytes and FLOPs; none for a part of a run."""
    if not run.is_complete:
        return {}
    of_run = run.num_steps, run.num_block_reads, run.num_computed_tokens
    return {"floor": done / bench.floor.run_s(*of_run), "floor_in_turn": done / bench.floor.run_in_turn_s(*of_run)}


def _warm_up(bench: Bench, llm: Any, work: Workload, num_requests: int, length: int, n: int = 1) -> None:
    """Run the beginning of the same work, cut short."""
    lens = work.output_lens[:num_requests]
    bench.run(llm, work.prompts[:num_requests], [sampling(max_tokens=min(each, length), n=n) for each in lens])


def _sharegpt_name(bench: Bench) -> str:
    return f"sharegpt{bench.sizes.num_sharegpt}"


def _sharegpt_work(bench: Bench) -> Workload:
    return _cut(workloads.sharegpt(bench.sizes.num_sharegpt, 1, vocab_size=bench.vocab_size), bench)


def _cut(work: Workload, bench: Bench) -> Workload:
    """Shorten prompts and outputs as the sizes say."""
    divisor = bench.sizes.length_divisor
    prompts = [prompt[: -(-len(prompt) // divisor)] for prompt in work.prompts]
    return Workload(prompts, [-(-length // divisor) for length in work.output_lens])


def _fresh_prompts(bench: Bench, count: int, seed: int) -> list[list[int]]:
    return uniform(count, bench.sizes.prompt_len, 1, seed=seed, vocab_size=bench.vocab_size).prompts


def _trace_path(options: Any, name: str) -> Path | None:
    return None if options.profile is None else options.profile / name
