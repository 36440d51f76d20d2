"""Experiments on several sequences a request, parallel samples and beams: figures 14 and 15."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bench.paper.beams import DEFAULT_CANDIDATES, CandidateModel
from bench.paper.experiment import Experiment, Paper, Plot, Report, Row
from bench.paper.latency import ORCAS, SETTING, Panel, panel_plots, panel_tasks, rate_table, ratio_rows, sweep_data
from bench.paper.memory import DATASETS, Load
from bench.paper.paged import Paged
from bench.paper.sustained import Sweep, measure_latency
from bench.paper.traces import Decoding, TraceMaker
from bench.workloads import alpaca

DECODINGS = tuple(Decoding(width, is_beam) for is_beam in (False, True) for width in (2, 4, 6))

# Figure 14 ------------------------------------------------------------------------------------------------------------


def _panel(decoding: Decoding) -> Panel:
    first_rates = {"Orca (Max)": 4, "Orca (Pow2)": 24, "Orca (Oracle)": 40, "jpaged": 56}
    first_rates = {name: rate / decoding.width for name, rate in first_rates.items()}
    return Panel(str(decoding), alpaca, 60, 128 / decoding.width, first_rates, decoding=decoding)


_PANELS = tuple(_panel(decoding) for decoding in DECODINGS)
_GAINS: Mapping[str, Paper] = {"beam width 6": 2.3}


def _report_latency(results: Mapping[Any, Sweep]) -> Report:
    rows = [
        row
        for panel in _PANELS
        for row in ratio_rows(results, panel.title, {"Orca (Oracle)": _GAINS.get(panel.title), "Orca (Max)": None})
    ]
    return Report(
        setting="Alpaca; " + SETTING + "; arrivals for 1 minute",
        rows=rows,
        tables=[rate_table(results)],
        notes=(
            "The gain grows with the width and is greater for beams, as in the paper, whose text gives 1.3x for one "
            "sequence and 2.3x for six beams. Its baselines also copy KV between beams; here they do so for nothing. "
            "Of Orca (Max)'s seven reservations a request of four or six takes most, so requests run one by one."
        ),
        plots=panel_plots(results),
        data=sweep_data(results),
    )


FIG14 = Experiment(
    "fig14", "Latency over request rate, samples and beams", partial(panel_tasks, _PANELS, ORCAS), _report_latency
)


# Figure 15 ------------------------------------------------------------------------------------------------------------

_SHAREGPT_SAVED = 16.2, (16.2, 30.5), 30.5, 44.3, (44.3, 66.3), 66.3
PAPER_SAVED: Mapping[tuple[str, Decoding], Paper] = {
    (dataset, decoding): saved
    for dataset, figures in (("Alpaca", (6.09, 8.53, 9.79, 37.56, 53.13, 55.16)), ("ShareGPT", _SHAREGPT_SAVED))
    for decoding, saved in zip(DECODINGS, figures, strict=True)
}
"""Per cent. For ShareGPT the paper gives the ends of a range: they stand for the narrowest and the widest."""

LOADS = Load("Alpaca", 6, 60), Load("ShareGPT", 0.3, 600)
"""The same requests at every width, so few that preemption does not change the saving."""

OTHER_MODELS = CandidateModel(alikeness=0), CandidateModel(alikeness=0.9)


def measure_saved(load: Load, decoding: Decoding, model: CandidateModel, scale: float) -> float:
    """Per cent of blocks that sharing saves, over all steps of a trace."""
    traces = TraceMaker(DATASETS[load.dataset], scale * load.seconds, load.rate, decoding)
    return 100 * measure_latency(Paged(candidates=model), traces.at(load.rate)).saved


def _saved_tasks(scale: float) -> dict[Any, Callable[[], float]]:
    tasks = {
        (load.dataset, decoding, DEFAULT_CANDIDATES): partial(measure_saved, load, decoding, DEFAULT_CANDIDATES, scale)
        for load in LOADS
        for decoding in DECODINGS
    }
    alpaca_load, widest = LOADS[0], DECODINGS[-1]
    others = {
        (alpaca_load.dataset, widest, model): partial(measure_saved, alpaca_load, widest, model, scale)
        for model in OTHER_MODELS
    }
    return tasks | others


def _report_saved(results: Mapping[Any, float]) -> Report:
    rows = []
    for (dataset, decoding, model), saved in results.items():
        label = f"{dataset}: {decoding}"
        if model != DEFAULT_CANDIDATES:
            label += f", beams alike in {100 * model.alikeness:.0f}% of steps"
        rows.append(Row(label, PAPER_SAVED[dataset, decoding], saved, "%"))
    plots = []
    for dataset in (load.dataset for load in LOADS):
        groups: dict[str, dict[str, float]] = {}
        for decoding in DECODINGS:
            paper = PAPER_SAVED[dataset, decoding]
            bars = {"paper": paper} if isinstance(paper, float) else {}
            bars["jpaged"] = results[dataset, decoding, DEFAULT_CANDIDATES]
            groups[str(decoding).replace("beam width", "beam")] = bars
        plots.append(Plot(dataset, "% of blocks saved", bars=groups))
    return Report(
        setting="Blocks saved by sharing / blocks without sharing, over all steps",
        rows=rows,
        tables=[],
        notes=(
            f"{DEFAULT_CANDIDATES.describe()} The last rows show how much that choice matters. Wide beams share more "
            "here than in the paper, up to nearly all they could, (width - 1) / width less the last blocks: rivals of "
            "its model may live longer side by side than the rivals of any such law. Samples share a prompt."
        ),
        plots=plots,
        data={f"{dataset}: {decoding}, {model}": saved for (dataset, decoding, model), saved in results.items()},
    )


FIG15 = Experiment("fig15", "Memory saved by sharing", _saved_tasks, _report_saved)
