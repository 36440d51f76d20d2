"""The figures of bench/README.md, beside the result files that they come from."""

import json

from bench.peers import KERNELS, KV_ON_HOST, SERVING
from bench.report import RESULTS
from tests.support import tpu_aot

README = (RESULTS.parent / "README.md").read_text()


def test_measured_figures_are_those_of_the_result_files():
    demo = _result("serving_demo_cpu")
    batching, waste = demo["continuous_batching"], demo["waste"]
    shown = [
        f"{batching['one_at_a_time_tokens_per_s']:.0f} tokens/s",
        f"{batching['batched_tokens_per_s']:,.0f} tokens/s, **{batching['ratio']:.1f} times**",
        f"{waste['mean_percent']:.1f}% (at most {waste['max_percent']:.1f}% in any step)",
    ]
    for text in shown:
        assert text in README


SERVED = {
    "decode_1_ms": ("decode step, batch 1, 1k context, ms", 2),
    "decode_32_ms": ("batch 32, ms", 2),
    "decode_128_ms": ("batch 128, ms", 2),
    "decode_256_ms": ("batch 256, ms", 2),
    "prefill32_s": ("prefill of 32 prompts of 1024, s", 3),
    "sharegpt1000_tokens_per_s": ("1,000 requests of ShareGPT lengths, tokens/s", 0),
    "sharegpt1000_2048blocks_auto_tokens_per_s": ("the same in 2,048 blocks, tokens/s", 0),
    "sharegpt1000_2048blocks_auto_kept_percent": ("which keeps of its throughput, %", 1),
    "sharedprefix341_500_requests_per_s": ("500 requests behind a prefix of 341 tokens, requests/s", 0),
    "parallel4_200_tokens_per_s": ("200 requests, n = 4, tokens/s", 0),
    "beam4_64x64_tokens_per_s": ("64 beam searches of width 4, beam tokens/s", 0),
    "startup_s": ("start-up, cold, s", 0),
    "startup_warm_s": ("warm, s", 1),
}
"""Figure -> its row in the README, and its decimals."""


def test_serving_is_that_of_the_result_files():
    models = "llama3-8b", "qwen3-0.6b", "opt-13b"
    results = [_result(f"serving_{model}_nvidia-h200") for model in models]
    rows = _table("jpaged, vLLM, ratio; of the floor")
    assert {name for result in results for name in result["figures"]} == set(SERVED)
    for name, (title, decimals) in SERVED.items():
        cells = [_served(result["figures"].get(name), decimals) for result in results]
        assert rows[title] == cells, name
    limits = results[0]["limits"]
    assert f"({limits['read_bytes_per_s'] / 1e12:.2f} TB/s beside llama3-8b)" in README
    assert f"({limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s)" in README


def test_a_run_with_the_engines_own_settings_is_that_of_the_result_file():
    table, result = _table("llama3-8b, the engine's own settings"), _result("serving_llama3-8b_1024rows_nvidia-h200")
    settings, unfinished = result["settings"], ["sharedprefix341_500"]
    assert (settings["max_num_seqs"], settings["max_num_batched_tokens"]) == (1024, 8192)
    assert (result["failed"], result["unfinished"], len(table)) == ({}, unfinished, 2 + len(result["figures"]))
    for name, figure in result["figures"].items():
        title, decimals = SERVED[name]
        shares = [figure["fraction_of_floor"], figure["fraction_of_floor_in_turn"]]
        values = [f"{figure[key]:,.{decimals}f}" for key in ("value", "peer")]
        cells = [*values, f"{figure['ratio_to_peer']:.2f}", *["" if x is None else f"{x:.0%}" for x in shares]]
        assert table[title] == cells, name


def test_larger_models_are_those_of_the_result_files():
    table = _table("random weights, bf16")
    figures = [_result(f"serving_{model}_nvidia-h200")["figures"] for model in ("gemma3-27b", "qwen3-30b-a3b")]
    for name in ("decode_1_ms", "decode_32_ms", "decode_256_ms", "prefill32_s"):
        title, decimals = SERVED[name]
        cells = []
        for figure in (each.get(name) for each in figures):
            cells += ["", ""] if figure is None else [f"{figure['value']:.{decimals}f}", _share(figure)]
        assert table[title.replace(", 1k context", "")] == cells, name


def _share(figure: dict) -> str:
    return f"{figure['fraction_of_floor']:.0%}"


def test_decodes_with_and_without_a_kernel_for_heads_are_those_of_the_result_files():
    table = _table("qwen3-0.6b, one H200")
    files = (_result(f"serving_qwen3-0.6b_{name}_nvidia-h200")["figures"] for name in ("rope_write", "no_rope_write"))
    ours, others = files
    for name in ours.keys() - {"startup_s"}:
        title, decimals = SERVED[name]
        assert table[title] == [f"{each[name]['value']:.{decimals}f}" for each in (ours, others)], name


def test_two_commits_are_those_of_the_result_files():
    table = _table("llama3-8b: ab71ff5, 21e1d68")
    medians = _result("serving_llama3-8b_rows_against_ab71ff5_nvidia-h200")["median"]
    for name in medians["256 rows"]:
        title, decimals = SERVED[name]
        cells = []
        for rows in (256, 1024):
            values = [medians[f"{rows} {commit}"][name] for commit in ("ab71ff5", "rows")]
            cells.append(", ".join(f"{value:,.{decimals}f}" for value in values))
        assert table[title] == cells, name


def test_two_gpus_are_those_of_the_result_files():
    table = _table("llama3-8b, 1,024 rows")
    one = _result("serving_llama3-8b_rows_against_ab71ff5_nvidia-h200")["median"]["1024 rows"]
    two = _result("serving_llama3-8b_2gpus_nvidia-h200")
    assert two["environment"]["num_devices"] == 2
    for name, value in one.items():
        title, decimals = SERVED[name]
        figure = two["figures"][name]
        cells = [f"{value:,.{decimals}f}", f"{figure['value']:,.{decimals}f}", f"{figure['fraction_of_floor']:.0%}"]
        assert table[title] == cells, name


def test_rates_of_the_host_pool_are_those_of_the_result_file():
    moves = _result("host_pool_nvidia-h200")["moves"]
    rates = {(move["direction"], move["slots"], move["num_blocks"]): move["gb_per_s"] for move in moves}
    kinds = ("to_host", "apart"), ("from_host", "apart"), ("from_host", "side by side")
    table = _table("one H200, blocks")
    for num_blocks in (4, 32, 256, 1024):
        assert table[f"{num_blocks:,}"] == [str(rates[*kind, num_blocks]) for kind in kinds]


def test_figures_of_the_page_on_host_memory_are_those_of_the_result_files():
    page = (RESULTS.parents[1] / "jpaged" / "docs" / "offload.md").read_text()
    moves, kernels = _result("host_pool_nvidia-h200")["moves"], _result("kernels_nvidia-h200")["rows"]
    [link] = [
        move["gb_per_s"]
        for move in moves
        if (move["direction"], move["slots"], move["num_blocks"]) == ("from_host", "apart", 1024)
    ]
    [read] = [
        row["bytes_per_s"] for row in kernels if (row["shape"], row["implementation"]) == ("decode_b256_1k", "hopper")
    ]
    assert f"blocks came from the host at {link:.0f} GB/s" in page
    assert f"attention read KV on the device at {read / 1e12:.1f} TB/s" in " ".join(page.split())


HOST_DECODES = {
    "llama3-8b, 4,096 tokens: K and V": ("llama3-8b", None),
    "the same in int8": ("llama3-8b_int8", None),
    "opt-13b, 1,024 tokens: K and V": ("opt-13b_kv", "opt-13b"),
    "opt-13b: activations": ("opt-13b", "opt-13b"),
    "opt-6.7b, 1,024 tokens: K and V": ("opt-6.7b_kv", "opt-6.7b"),
    "opt-6.7b: activations": ("opt-6.7b", "opt-6.7b"),
}
"""Row of the README -> its result, and the shapes of the peer."""


def test_decodes_over_the_host_are_those_of_the_result_files():
    table, [peer] = _table("32 sequences, one H200"), KV_ON_HOST.values()
    assert set(HOST_DECODES) < set(table)
    for title, (name, shapes) in HOST_DECODES.items():
        [variant] = _result(f"offload_decode_{name}_nvidia-h200")["variants"]
        [run] = variant["runs"]
        best = run["best"]
        assert (run["work"]["num_seqs"], best["num_programs_compiled"]) == (32, 0)
        rates = [f"{best[key] / 1e9:.1f}" for key in ("kv_bytes_per_s", "link_bytes_per_s")]
        ratio = "" if shapes is None else f"{peer['figures'][shapes]['step_ms'] / best['step_ms']:.2f}"
        assert table[title] == [f"{best['step_ms']:.0f}", *rates, f"{best['share_of_copies']:.0%}", ratio], title


def test_restores_are_those_of_the_result_files():
    table = _table("ms to the next token, one H200")
    for name in ("llama3-8b", "opt-13b"):
        [restore] = _result(f"offload_restore_{name}_nvidia-h200")["restores"]
        assert (restore["num_tokens"], restore["num_decodes"]) == (8000, 0)
        times = [f"{restore['ways'][way]['restore_ms']:.1f}" for way in ("swap", "recompute", "both", "auto")]
        assert table[name] == [*times, f"{restore['gain_of_both']:.2f}"]
        assert (restore["num_tokens_compared"], restore["are_tokens_equal"]) == (24, name == "opt-13b")
    assert "opt-13b draws the same 24 tokens. Those of llama3-8b are not all the same" in README


def test_shared_prefixes_and_prompts_over_8_bit_pools_are_those_of_the_result_file():
    result = _result("kernels_shared_and_8bit_nvidia-h200")
    us = {row["shape"]: f"{row['us']:.1f}" for row in result["rows"]}
    rows, prefill = {row[0]: row[1:] for row in _rows()}, "prefill_2x1024_at_4k"
    for title, shape, other in (
        ("batch 256 behind one prefix of 341, read once", "decode_b256_shared_prefix_read_once", None),
        ("behind one prefix of 4,096, read once", "decode_b256_shared_4k_read_once", None),
        ("prefill, 2 chunks of 1024 at 4k, KV in fp8", f"{prefill}_fp8", prefill),
    ):
        assert rows[title] == [us[shape], us[other or shape.removesuffix("_read_once")]]
    assert f"| KV in int8 | {us[f'{prefill}_int8']} | {us[prefill]} |" in README
    copies = {copy["name"]: copy for copy in result["copies"]}
    ours, other = copies["copy_blocks_64_hopper"], copies["copy_blocks_64"]
    assert f"takes {ours['us']:.1f} us, {ours['bytes_per_s'] / 1e12:.2f} TB/s read and written; XLA takes" in README
    assert f"{other['us']:.1f} us, and allocates {other['temporary_bytes'] >> 20} MiB" in README
    limits = result["limits"]
    assert (
        f"{limits['read_bytes_per_s'] / 1e12:.2f} TB/s read, {limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s):"
        in README
    )


def test_the_servers_figures_are_those_of_the_result_file():
    table, result = _table("llama3-8b over HTTP"), _result("serve_llama3-8b_nvidia-h200")
    assert table["`LLM.generate`"][0] == f"{result['offline']['tokens_per_s']:,.0f}"
    at_once, half = result["phases"]
    for row, phase, decimals in (("all at once", at_once, 2), ("half the rate", half, 3)):
        times = [f"{phase[key]:.{decimals}f}" for key in ("ttft_p50_s", "ttft_p99_s")]
        steps = ["", ""]
        if phase["rate"] is not None:
            steps = [f"{phase['first_token_steps_p99']:.0f}", f"{phase['ttft_p99_steps']:.1f}"]
        between = [f"{1e3 * phase[key]:.1f}" for key in ("itl_p50_s", "itl_p99_s")]
        assert table[row] == [f"{phase['tokens_per_s']:,.0f}", *times, *steps, *between]


def _served(figure: dict | None, decimals: int) -> str:
    if figure is None:
        return ""
    cell = f"**{figure['value']:,.{decimals}f}**, {figure['peer']:,.{decimals}f}, {figure['ratio_to_peer']:.2f}"
    return cell + ("" if figure["floor"] is None else f"; {figure['fraction_of_floor']:.0%}")


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _rows() -> list[list[str]]:
    return [_cells(line) for line in README.splitlines() if line[:1] == "|"]


def _table(corner: str) -> dict[str, list[str]]:
    """The rows by title of the one table with this cell in its corner."""
    [table] = [part for part in README.split("\n\n") if part.startswith(f"| {corner} |")]
    return {row[0]: row[1:] for row in map(_cells, table.splitlines())}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_settings_and_figures_of_a_peer_are_shown_together():
    newest = SERVING["vLLM 0.26.0"]
    table = _table("vLLM 0.26.0, its defaults")
    shown = {name for figures in newest["figures"].values() for name in figures}
    assert len(table) == 2 + len(shown), "a header, a rule and the figures"
    for name in shown:
        title, decimals = SERVED[name]
        values = [figures.get(name) for figures in newest["figures"].values()]
        assert table[title] == ["" if value is None else f"{value:,.{decimals}f}" for value in values], name
    text = " ".join(README.split())
    assert newest["settings"].removeprefix("its own defaults: ") in text
    assert all(setting in text for setting in SERVING["vLLM 0.24.0"]["settings"].split(", "))


def test_8_bit_pools_are_those_of_the_result_file():
    table, pools = _table("pool"), _result("kv_quantization")["pools"]
    for name, found in pools.items():
        assert found["mean"] < 0.01
        nats = [f"{found[kind]:.4f}" for kind in ("mean", "prompts", "decodes")]
        assert table[name] == [*nats, f"{found['same_best']:.1%}", f"{found['capacity']:.2f} times"]


def test_kernels_are_those_of_the_result_file():
    result, rows = _result("kernels_nvidia-h200"), _rows()
    peers = KERNELS["figures"]
    figures = {(row["shape"], row["implementation"]): row for row in result["rows"] if "us" in row}
    shapes = [shape for shape, name in figures if name == "hopper" and not shape.startswith("mixed")]
    assert shapes
    for shape in shapes:
        is_decode = shape.startswith("decode")

        def rate(bytes_per_s, flops_per_s, is_decode=is_decode):
            return f"{bytes_per_s / 1e12:.2f} TB/s" if is_decode else f"{flops_per_s / 1e12:.0f} TFLOP/s"

        ours, other = (figures.get((shape, name)) for name in ("hopper", "jax" if is_decode else "cudnn"))
        limit = ours["fraction_of_read_bandwidth" if is_decode else "fraction_of_matmul_rate"]
        beside = "" if other is None else rate(other["bytes_per_s"], other["flops_per_s"])
        peer = peers.get(shape, {}).get("FlashInfer")
        peer = "" if peer is None else rate(peer * 1e12, peer * 1e12)
        cells = [f"{ours['us']:.1f}", rate(ours["bytes_per_s"], ours["flops_per_s"]), f"{limit:.0%}", beside, peer]
        assert cells in [row[1:] for row in rows], shape
    comparisons = {title: of["hopper"] for title, of in result["comparisons"].items()}
    assert f"read {1 / comparisons['fp8 over bf16']:.2f} (fp8)" in README
    assert f"{1 / comparisons['int8 over bf16']:.2f} (int8)" in README
    assert f"takes {comparisons['mixed over its decodes and chunks alone']:.2f} times" in README
    write = next(copy for copy in result["copies"] if copy["name"] == "write_kv_256_decodes")
    assert f"takes {write['us']:.1f} us" in README
    limits = result["limits"]
    assert f"{limits['read_bytes_per_s'] / 1e12:.2f} TB/s read" in README
    assert f"{limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s" in README


def test_cases_compiled_for_tpus_are_those_of_the_grid():
    num_cases = len(list(tpu_aot.grid()))
    assert f"a grid of {num_cases:,} cases" in README
    result = _result("tpu_grid")
    assert sum(counts["compiled"] for counts in result["generations"].values()) == num_cases


def test_bytes_of_decodes_on_tpus_are_those_of_the_plan():
    rows = [
        row for row in _result("tpu_plan")["rows"] if row["batch"] == "decode 128 at 1k" and row["block_size"] == 16
    ]
    worst = max(row["moved_bytes"] / row["least_bytes"] for row in rows if row["pool_dtype"] == "bfloat16")
    assert f"at most {100 * (worst - 1):.1f}% more bytes" in README
    assert worst <= 1.03


def test_models_on_tpus_are_those_of_the_result_file():
    shown = {(row[0], row[1]): row[2:] for row in _rows() if len(row) == 7 and " x v" in row[1]}
    for fit in _result("tpu_models")["fits"]:
        row = [_gib(fit["hbm_bytes"]), _gib(fit["parameter_bytes"])]
        if fit["reason"] is not None:
            row += ["does not fit", "", ""]
        else:
            temporaries = ", ".join(_gib(step["temporary_bytes"]) for step in fit["steps"])
            row += [_gib(fit["pool_bytes"]), temporaries, f"{fit['context_tokens']:,}"]
        assert shown.pop((fit["model"], f"{fit['num_chips']} x {fit['generation']}")) == row
    assert not shown


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f}"


def test_sharing_is_that_of_the_result_files():
    measured, simulated = _result("sharing_demo_cpu"), _result("paper")["experiments"]["fig15"]["figures"]
    ours = {figure["label"]: figure["ours"] for figure in simulated}
    for trace in ("Alpaca", "ShareGPT"):
        for kind, title, label in (("parallel", "samples", "n ="), ("beam", "beams", "beam width")):
            figures = [f["percent"] for f in measured["traces"][trace]["figures"] if f["kind"] == kind]
            in_traces = [ours[f"{trace}: {label} {width}"] for width in (2, 4, 6)]
            cells = [" / ".join(f"{value:.1f}" for value in values) for values in (figures, in_traces)]
            assert [row[2:] for row in _rows() if row[0] == f"{title}, {trace}"] == [cells]


def test_pressure_is_that_of_the_result_files():
    beams = _result("serving_llama3-8b_sharing_nvidia-h200")["figures"]["beam4_64x64_tokens_per_s"]
    pressure = _result("serving_llama3-8b_pressure_nvidia-h200")["figures"]
    rows = {row[0]: row[1:] for row in _rows()}
    unit = "beam tokens/s"
    expected = [f"{beams['value']:,.0f} {unit}", f"{beams['peer']:,} {unit}", f"{beams['ratio_to_peer']:.2f}"]
    assert rows["64 prompts, beam width 4, 64 tokens"] == expected
    assert rows["of plain decoding of as many rows"][0] == f"{beams['of_plain_percent']:.0f}%"
    for name, title in (("swap", "throughput kept with 2,048 blocks, swap"), ("recompute", "recompute")):
        kept = pressure[f"sharegpt1000_2048blocks_{name}_kept_percent"]
        assert rows[title] == [f"{kept['value']:.1f}%", f"{kept['peer']}%", f"{kept['ratio_to_peer']:.2f}"]
    swap = pressure["sharegpt1000_2048blocks_swap_tokens_per_s"]
    to_host, from_host = (swap[name] / 2**30 for name in ("bytes_to_host", "bytes_from_host"))
    said = (
        f"With {swap['num_swaps_out']} swaps, {to_host:.0f} GiB went to the host and {from_host:.0f} GiB came back, "
        f"spilled prefixes included, and steps waited {swap['transfer_stalled_s']:.2f} s of {swap['elapsed_s']:.0f} "
    )
    assert said in " ".join(README.split())


def test_admission_is_that_of_the_result_file():
    replays, shown = _result("replay")["under_pressure"], _table("simulated")
    for title in {title.rpartition(", ")[0] for title in replays}:
        ways = replays[f"{title}, if it fits now"], replays[f"{title}, by growth"]
        formats = {
            "num_preemptions": "{:,}",
            "num_plans": "{:,}",
            "mean_rows": "{:.1f}",
            "fill_percent": "{:.1f}%",
            "tokens_per_s": "{:,.0f}",
        }
        assert shown[title] == [" / ".join(form.format(way[name]) for way in ways) for name, form in formats.items()]


def test_first_tokens_are_those_of_the_result_file():
    arrivals, shown = _result("replay")["arrivals"], _table("first tokens")
    percentiles = ("p50", "p99")
    assert shown["steps"] == [f"{arrivals[f'steps_{p}']:.0f}" for p in percentiles]
    assert shown["ms"] == [f"{1e3 * arrivals[f'ttft_s_{p}']:.0f}" for p in percentiles]
    assert f"at random, {arrivals['requests_per_s']:.1f} a second" in README


def test_padding_is_that_of_the_result_file():
    shown = _table("sizes of steps")
    for title, row in _result("replay")["padding"].items():
        percents = [f"{row[name]:#.3g}%" for name in ("row_steps_percent", "seconds_percent")]
        assert shown[title] == [str(row["num_sizes"]), *percents]


def test_the_papers_figures_are_those_of_the_result_file():
    experiments, rows = _result("paper")["experiments"], {row[0]: row[1:] for row in _rows()}
    for title, experiment, label in (
        ("KV memory that holds tokens, of the pool (figure 2)", "fig02", "jpaged: token states"),
        ("sustained rate over Orca (Oracle), ShareGPT (figure 12)", "fig12", "ShareGPT: jpaged over Orca (Oracle)"),
        ("behind a shared prefix of 80 tokens (figure 16)", "fig16", "1-shot (80 tokens): jpaged over Orca (Oracle)"),
        ("of 341 tokens", "fig16", "5-shot (341 tokens): jpaged over Orca (Oracle)"),
        ("chat (figure 17)", "fig17", "Chat: jpaged over Orca (Oracle)"),
    ):
        [ours] = [figure["ours"] for figure in experiments[experiment]["figures"] if figure["label"] == label]
        assert rows[title][1] == (f"{ours:.1f}%" if experiment == "fig02" else f"{ours:.2f}x")
