"""The check of kernels: its cases, a line and an entry of the result file for each verdict."""

import argparse
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from bench import UsageError
from bench.kernels import check, check_norms, check_writes
from bench.kernels.case import Case, Programs
from bench.kernels.compiling import compile_each, num_tracers, one_line
from bench.kernels.contenders import all_contenders
from bench.kernels.shapes import MEASURED, choose_names
from bench.report import device_name, save, start_report
from pallas_kernels.chips.here import why_no_hopper

REPEATED = ("decode_b256_shared_prefix", "decode_b256_shared_4k", "prefill_2x1024_at_4k")
"""Measured shapes that are checked only by name. To the kernels the first two are ragged decodes. The last is part of a
mixed batch."""

type MakeCase = Callable[[Collection[str]], Case]
"""From the names of implementations to a case."""


def run_check(args: argparse.Namespace) -> int:
    """Check all cases asked for, and keep each verdict at once. Returns 1 if any is wrong, or none was checked."""
    verdicts: list[dict[str, Any]] = []
    report = start_report(args, is_complete=False, num_checked=0, num_wrong=0, verdicts=verdicts)
    name = f"kernels_check_{device_name()}"
    path = save(name, report, args.out)
    cases = {case_name: make(implementations) for case_name, make, implementations in _wanted(args)}
    for case_name, implementation, found in _examined(cases):
        verdicts.append(
            {"case": case_name, "implementation": implementation, **found, "at_s": time.perf_counter() - args.began}
        )
        report["num_checked"] += "not_taken" not in found
        report["num_wrong"] += "problem" in found
        print(f"{case_name:72} {implementation:10} {_line(found)}", flush=True)
        save(name, report, args.out)
    report["is_complete"] = True
    save(name, report, args.out)
    print(f"{report['num_checked']} checked, {report['num_wrong']} wrong, in {time.perf_counter() - args.began:.0f} s")
    print(f"written to {path}")
    return 1 if report["num_wrong"] or not report["num_checked"] else 0


def _wanted(args: argparse.Namespace) -> Iterator[tuple[str, MakeCase, list[str]]]:
    """Names of cases, their makers and the implementations to check.

    A real size is checked for the device's own kernels, and for others by name: the portable operations do not depend
    on it. Words that fit no case at all are refused, before any case is made.
    """
    ours = [c.name for c in all_contenders() if c.is_ours]
    asked = None if args.implementations is None else args.implementations.split(",")
    if unknown := sorted(set(asked or ()) - set(ours)):
        raise UsageError(f"--implementations {','.join(unknown)}: --check takes {', '.join(ours)}")
    implementations = [name for name in ours if asked is None or name in asked]
    of_real_size = [name for name in implementations if asked is not None or name != "xla"]
    left_out = REPEATED if args.shapes is None else ()
    measured = [shape.shrunk(args.shrink) for shape in MEASURED if shape.name not in left_out]
    writes = check_writes.cases() | check_norms.cases()
    names = choose_names(args.shapes, [*(shape.name for shape in (*MEASURED, *check.coverage())), *writes])
    for shapes, names_of_shapes in (
        (measured, [] if args.quick else of_real_size),
        (check.coverage(), implementations),
    ):
        for shape in shapes:
            if shape.name in names and names_of_shapes:
                yield shape.name, partial(check.case_of, shape), names_of_shapes
    if not args.no_copies and "hopper" in implementations and why_no_hopper() is None:
        for name, make in writes.items():
            if name in names:
                yield name, make, implementations


def _examined(cases: dict[str, Case]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, implementation and findings of each case, one after the other while the next are compiled."""
    sources = {
        (name, kind, part): source
        for name, case in cases.items()
        for kind, programs in (("tool", case.tools), ("implementation", case.implementations))
        for part, source in programs.items()
    }
    tools: dict[str, Programs] = {name: {} for name in cases}
    for (name, kind, part), program in compile_each(sources, num_processes=num_tracers(len(sources))):
        if kind == "tool":
            tools[name][part] = program
        else:
            yield name, part, _findings(cases[name], program, tools[name])


def _findings(case: Case, program: Any, tools: Programs) -> dict[str, Any]:
    """The error and the problem, as far as there are any; or the reason why the implementation does not take it."""
    if isinstance(program, NotImplementedError):
        return {"not_taken": str(program)}
    try:
        for each in (program, *tools.values()):
            if isinstance(each, Exception):
                raise each
        verdict = case.examine(program, tools)
    except Exception as error:
        return {"problem": one_line(error)}
    found = {"error": verdict.error, "problem": verdict.problem}
    return {key: value for key, value in found.items() if value is not None}


def _line(found: dict[str, Any]) -> str:
    if "not_taken" in found:
        return f"not taken: {found['not_taken']}"
    shown = f"error {found['error']:.2e}" if "error" in found else ""
    return f"{shown:15} {'ok' if 'problem' not in found else f'WRONG: {found["problem"]}'}"
