"""LLM as its users meet it: text in, text out, streams, interruptions and refusals. On the model in the box."""

import contextlib
from functools import cache

import pytest

from jpaged import LLM, BeamSearchParams, EngineConfig, FinishReason, PinnedPrefix, SamplingParams
from jpaged.engine.detokenizer import Detokenizer, TokenDecoder
from jpaged.llm import DEMO_MODEL
from tests.support.tiny import enlarged, tiny_config, tiny_model, with_few_sizes

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@cache
def llm() -> LLM:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 64}
    return with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False))


def generate(prompts, params=GREEDY):
    return llm().generate(prompts, params, use_tqdm=False)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    assert llm().stats().num_used_blocks == 0
    assert not llm().engine.has_unfinished
    assert llm().engine.take().is_empty
    assert len(llm().inbox) == 0


def test_text_is_the_decoded_tokens_and_results_keep_the_order_of_prompts():
    prompts = ["import os\n", "def f(x):", "class A:\n"]
    outputs = generate(prompts)
    assert [output.prompt for output in outputs] == prompts
    for output, prompt in zip(outputs, prompts, strict=True):
        ids = llm().tokenizer.encode(prompt)
        assert output.prompt_token_ids == ids
        [completion] = output.outputs
        assert llm().tokenizer.decode(ids + completion.token_ids) == prompt + completion.text
        assert completion.finish_reason is FinishReason.LENGTH
        assert len(completion.token_ids) == 12
    alone = generate("def f(x):")[0].outputs[0]
    assert (alone.token_ids, alone.text) == (outputs[1].outputs[0].token_ids, outputs[1].outputs[0].text)


def test_each_prompt_may_have_its_own_parameters():
    outputs = generate(["a = ", {"prompt_token_ids": [5, 6]}], [GREEDY, SamplingParams(max_tokens=3, n=2, seed=0)])
    assert [len(output.outputs) for output in outputs] == [1, 2]
    assert outputs[1].prompt is None


def test_a_stream_yields_the_text_piece_by_piece():
    whole = generate("for i in range(")[0].outputs[0]
    deltas = list(llm().stream("for i in range(", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + [FinishReason.LENGTH]


def test_streams_and_batches_share_the_engine():
    first, second = (llm().stream(prompt, GREEDY) for prompt in ("x = 1", "y = 2"))
    texts = [next(first).text, next(second).text]
    batch = generate("x = 1")
    texts[0] += "".join(delta.text for delta in first)
    texts[1] += "".join(delta.text for delta in second)
    assert texts == [generate(prompt)[0].outputs[0].text for prompt in ("x = 1", "y = 2")]
    assert batch[0].outputs[0].text == texts[0]


def test_an_aborted_stream_ends():
    stream = llm().stream(["x = 1", "y = 2"], GREEDY)
    first = next(stream)
    assert llm().abort(first.request_id)
    assert not llm().abort(first.request_id)
    rest = list(stream)
    ends = {delta.request_id: delta.finish_reason for delta in rest if delta.finish_reason}
    assert sorted(ends.values()) == [FinishReason.ABORT, FinishReason.LENGTH]
    assert ends[first.request_id] is FinishReason.ABORT


def test_closing_a_stream_aborts_it():
    stream = llm().stream(["x = 1", "y = 2"], GREEDY)
    next(stream)
    assert llm().stats().num_used_blocks > 0
    stream.close()


def test_a_stream_never_read_holds_nothing():
    llm().stream("x = 1", GREEDY)


def test_stop_strings_are_cut_off_and_never_streamed():
    text = generate("def f(x):")[0].outputs[0].text
    stop = text[5:8]
    expected = text[: text.index(stop)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop])
    [completion] = generate("def f(x):", params)[0].outputs
    assert completion.text == expected
    assert completion.finish_reason is FinishReason.STOP
    assert "".join(delta.text for delta in llm().stream("def f(x):", params)) == expected


def test_bursts_draw_nothing_behind_a_stop():
    """Neither behind a string that only the tokens' text shows, nor behind a token, nor where either is too early."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 64, "max_burst": 4}
    bursting = with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False))
    plain = generate("def f(x):")[0].outputs[0]
    limits = [
        {"stop": [plain.text[5:8]]},
        {"stop_token_ids": [plain.token_ids[4]]},
        {"stop_token_ids": [plain.token_ids[4]], "min_tokens": 8},
        {"max_tokens": 6},
    ]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | limit) for limit in limits]
    expected = [generate("def f(x):", one)[0].outputs[0] for one in params]
    outputs = [output.outputs[0] for output in bursting.generate(["def f(x):"] * 4, params, use_tqdm=False)]
    outputs += [bursting.generate("def f(x):", one, use_tqdm=False)[0].outputs[0] for one in params]
    for output, same in zip(outputs, expected * 2, strict=True):
        assert (output.token_ids, output.text, output.finish_reason) == (same.token_ids, same.text, same.finish_reason)


def test_a_stop_token_ends_the_text_before_it_and_the_tokens_with_it():
    plain = generate("def f(x):")[0].outputs[0]
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    [completion] = generate("def f(x):", params)[0].outputs
    assert completion.token_ids == plain.token_ids[: first + 1]
    assert plain.text.startswith(completion.text)
    assert completion.finish_reason is FinishReason.STOP


def test_the_same_seed_gives_the_same_text_and_another_another():
    def draw(seed):
        return generate("import ", SamplingParams(seed=seed, max_tokens=12, ignore_eos=True))[0].outputs[0].token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_invalid_prompt_is_refused_before_any_work():
    steps = llm().stats().num_steps
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        generate(["x = 1", ""])
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        generate("x = 1", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="expected SamplingParams"):
        generate("x = 1", {"temperature": 0})
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm().stream("")
    for prompts in (None, 5, {"prompt_token_ids": 5}, "\ud800abc"):
        with pytest.raises(ValueError, match="prompt"):
            generate(prompts)
    assert llm().stats().num_steps == steps


def test_a_pinned_prefix_is_found_until_it_is_let_go():
    prefix = "class Stack:\n    def push(self, item):\n"
    pinned = llm().pin_prefix(prefix)
    assert pinned.num_tokens == len(llm().tokenizer.encode(prefix))
    assert llm().stats().num_pinned_prefixes == 1
    ids = llm().tokenizer.encode(prefix)
    [output] = generate({"prompt_token_ids": [*ids, *ids[:3]]})
    assert output.num_cached_tokens == pinned.num_tokens
    for foreign in ("class", PinnedPrefix("pin 0", 3)):
        with pytest.raises(ValueError, match=r"expected what pin_prefix returned|is not pinned"):
            llm().unpin(foreign)
    llm().unpin(pinned)
    with pytest.raises(ValueError, match="unpinned already"):
        llm().unpin(pinned)


def test_an_interrupted_pin_leaves_nothing(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(llm().engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm().pin_prefix("import os\n")
    assert llm().stats().num_pinned_prefixes == 0


def test_beam_search_returns_sequences_best_first_and_greedy_for_width_one():
    prompts = ["import os\n", "def f(x):"]
    found = llm().beam_search(prompts, BeamSearchParams(3, 12, ignore_eos=True), use_tqdm=False)
    for output in found:
        scores = [completion.score for completion in output.outputs]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
        for completion in output.outputs:
            assert completion.score == pytest.approx(completion.cumulative_logprob / 12)
    greedy = llm().beam_search(prompts, [BeamSearchParams(1, 12, ignore_eos=True)] * 2, use_tqdm=False)
    assert [o.outputs[0].text for o in greedy] == [o.outputs[0].text for o in generate(prompts)]


def test_a_streamed_search_yields_each_sequence_once_in_the_end():
    params = BeamSearchParams(2, 6, ignore_eos=True).to_sampling_params()
    deltas = list(llm().stream("def f(x):", params))
    [output] = generate("def f(x):", params)
    assert [(d.index, d.text, d.token_ids) for d in deltas] == [(o.index, o.text, o.token_ids) for o in output.outputs]


@pytest.mark.parametrize(
    ("params", "match"), [(SamplingParams(), "expected BeamSearchParams"), ([BeamSearchParams(2, 4)] * 2, "2 sampling")]
)
def test_beam_search_with_wrong_parameters_is_refused(params, match):
    with pytest.raises(ValueError, match=match):
        llm().beam_search("a", params)


@pytest.mark.parametrize(("priority", "match"), [("high", "priority='high'"), ([1, 2], "2 priorities for 1 prompts")])
def test_an_invalid_priority_is_refused(priority, match):
    with pytest.raises(ValueError, match=match):
        llm().generate(["a"], GREEDY, priority=priority, use_tqdm=False)


def test_no_prompts_give_no_results():
    assert generate([]) == []


def test_an_interrupted_batch_leaves_nothing_and_the_engine_goes_on(monkeypatch):
    def interrupted(plan):
        raise KeyboardInterrupt

    stream = llm().stream("z = 3", GREEDY)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(llm().engine.runner, "fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(["x = 1", "y = 2"])
    assert len(generate("x = 1")[0].outputs[0].token_ids) == 12
    assert len(list(stream)) == 11, "the stream that was open goes on"


@pytest.mark.parametrize("stop", [None, "n"])
def test_interruptions_while_text_is_made_leave_other_streams_unchanged(monkeypatch, stop):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop=stop)
    expected = generate("def f(x):", params)[0].outputs[0]
    for when in range(1, 30, 2):
        stream = llm().stream("def f(x):", params)
        deltas = [next(stream)]
        calls = 0

        def interrupted(make, when=when):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == when:
                    raise KeyboardInterrupt
                return make(*args, **kwargs)

            return call

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in ("decode", "added"):
                patched.setattr(TokenDecoder, name, interrupted(getattr(TokenDecoder, name)))
            generate("x = 1", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        deltas += stream
        assert [t for delta in deltas for t in delta.token_ids] == expected.token_ids
        assert "".join(delta.text for delta in deltas) == expected.text


def test_text_is_made_once_at_the_end_unless_a_caller_or_a_stop_string_waits_for_it(monkeypatch):
    extend, num_calls = Detokenizer.extend, 0

    def counted(self, *args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        return extend(self, *args, **kwargs)

    monkeypatch.setattr(Detokenizer, "extend", counted)
    [whole] = generate("def f(x):")
    assert num_calls == 1
    [watched] = generate("def f(x):", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop="never seen"))
    assert num_calls == 1 + 12
    assert watched.outputs[0].text == whole.outputs[0].text


def test_a_request_whose_text_cannot_be_made_fails_alone(monkeypatch):
    decode, prompt = TokenDecoder.decode, llm().tokenizer.encode("x = 1")

    def broken(self, token_ids, **kwargs):
        if token_ids[: len(prompt)] == prompt:  # the text that continues one prompt
            raise LookupError("no such token")
        return decode(self, token_ids, **kwargs)

    stream = llm().stream("def f(y):", GREEDY)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(TokenDecoder, "decode", broken)
        with pytest.raises(LookupError, match="no such token"):
            generate("x = 1")
    assert len(list(stream)) == 11
    assert len(generate("x = 1")[0].outputs[0].token_ids) == 12


def test_text_that_the_vocabulary_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(llm().tokenizer, "encode", lambda text: [5, 2048])
    with pytest.raises(ValueError, match=r"the prompt\[1\]=2048 is not valid: expected token ids from 0 to 2047"):
        generate("x")


def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_weights(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes()[:600])
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded"):
        LLM(tmp_path, use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "/no/such/directory"}, "/no/such/directory"),
        ({"max_model_len": 2048}, "max_model_len=2048 is more than the model's own limit of 1024"),
        ({"num_blocks": 10**8}, "num_blocks=100000000 x 81,920 bytes do not fit"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"tensor_parallel_size": 3}, "num_kv_heads=2|num_heads=4"),
        ({"attention_implementation": "magic"}, "attention_implementation='magic' cannot be had"),
        ({"attention_implementation": "reference"}, "attention_implementation='reference' cannot be had"),
        ({"attention_implementation": "pallas_tpu"}, "cannot run here: the TPU kernels need a TPU"),
        ({"attention_implementation": "hopper"}, "cannot run here: the Hopper kernels need an NVIDIA GPU"),
        ({"interpret": True}, "only .* can be interpreted"),
        ({"attention_implementation": "xla", "interpret": True}, "only .* can be interpreted"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        LLM(**settings, warm_up=False, use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_blocks": 10**8}, "num_blocks=100000000 x 81,920 bytes do not fit"),
        ({"host_memory_bytes": 1 << 50}, r"does not fit: 13,743,895,347 blocks x 81,920 bytes = .* are free"),
        ({"kv_placement": "auto", "num_host_blocks": 1 << 24}, "does not fit: 16,777,216 blocks x 81,920 bytes = "),
        ({"kv_placement": "host", "num_blocks": 2}, "num_blocks=2 is too few .* the window .* holds no block"),
        (
            {"kv_placement": "host", "num_blocks": 9, "num_host_blocks": 40, "max_model_len": 1000},
            "max_model_len=1000 does not fit .* 4 of 9 blocks on the device.* 10 of 40 on the host.* hold 224 tokens",
        ),
    ],
)
def test_pools_and_contexts_that_do_not_fit_are_refused_before_the_weights_are_read(settings, match, monkeypatch):
    monkeypatch.setattr("jpaged.engine.loading.load_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=match):
        LLM(**settings, warm_up=False, use_tqdm=False)


@pytest.mark.starts_first
@pytest.mark.parametrize(("max_burst", "num_devices"), [(1, 1), (3, 2), (1, 4)])
def test_the_tpu_kernel_interpreted_gives_the_tokens_of_the_portable_path(max_burst, num_devices):
    """With heads of the model in the box, but one layer: the interpreter is slow."""
    model_config = tiny_config(num_layers=1, head_dim=64)
    model = enlarged(tiny_model(model_config, tensor_parallel_size=num_devices))
    sizes = {"num_blocks": 40, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128}
    prompts = [{"prompt_token_ids": [i % 23 for i in range(1, 1 + n)]} for n in (5, 17, 1)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5, 3)]
    tokens = []
    for kernel in ({"attention_implementation": "xla"}, {"attention_implementation": "pallas_tpu", "interpret": True}):
        config = EngineConfig(**sizes, **kernel, max_burst=max_burst, tensor_parallel_size=num_devices)
        llm = with_few_sizes(LLM.from_model(model, model_config, config, warm_up=False, use_tqdm=False))
        is_tpu = llm.engine.runner.programs.backend.name == "pallas_tpu"
        rows_of_device = llm.engine.runner.cache.pool.addressable_shards[0].data.shape[3:]
        assert rows_of_device == ((1, 16, 128) if is_tpu else (max(2 // num_devices, 1), 16, 64))
        tokens.append([result.outputs[0].token_ids for result in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]
