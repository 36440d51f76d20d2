"""AsyncLLM as the tasks of an event loop meet it: outputs of every kind, ends of every kind, nothing left behind."""

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache

import pytest

from jpaged import LLM, AsyncLLM, BeamSearchParams, FinishReason, RequestOutput, RequestOutputKind, SamplingParams
from jpaged.engine.detokenizer import TokenDecoder
from jpaged.engine.health import EngineDeadError, HealthState
from jpaged.engine.outputs import StepOutput
from jpaged.engine.request_stream import RequestStream
from jpaged.engine.snapshot import BlockUse
from jpaged.engine.stats import EngineStats
from jpaged.request import CompletionDelta, Request
from tests.support.tiny import with_few_sizes

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
LONG = replace(GREEDY, max_tokens=200)
TIMEOUT_S = 900
"""Only a failing test waits for so long."""


@cache
def template() -> LLM:
    """Its runner serves all tests: programs are compiled once."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 64}
    return with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False))


@cache
def expected(prompt: str, params: SamplingParams = GREEDY) -> RequestOutput:
    return template().generate(prompt, params, use_tqdm=False)[0]


def fresh() -> LLM:
    engine = template().engine
    return LLM.from_engine(type(engine)(engine.runner, engine.config, engine.tokenizer))


def serve(task: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run a task over an AsyncLLM, and see that nothing is left behind."""

    async def run() -> None:
        llm = AsyncLLM.from_llm(fresh())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await task(llm)
                if llm.health().is_healthy:
                    await idle(llm)
                    assert llm.num_unfinished == 0
                    assert (await llm.stats()).num_used_blocks == 0
                    assert not await llm.ask(lambda engine: engine.has_unfinished)
        finally:
            llm.shutdown()

    asyncio.run(run())


async def idle(llm: AsyncLLM) -> EngineStats:
    """Let the engine finish or drop all that it has."""
    while await llm.ask(lambda engine: engine.has_unfinished):
        await asyncio.sleep(0)
    return await llm.stats()


async def read(llm: AsyncLLM, prompt, params: SamplingParams, **options) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, **options)]


def assert_close(logprobs, expected) -> None:
    """The same tokens, with log-probabilities that differ by rounding: the prefix cache changes the shapes of steps."""
    assert [list(entry) for entry in logprobs] == [list(entry) for entry in expected]
    values = [each.logprob for entry in logprobs for each in entry.values()]
    assert values == pytest.approx([each.logprob for entry in expected for each in entry.values()], abs=1e-4)


def test_outputs_are_cumulative_unless_asked_for_otherwise():
    params = replace(GREEDY, logprobs=2)
    whole = expected("def f(x):", params)

    async def task(llm):
        outputs = await read(llm, "def f(x):", params)
        assert_close(outputs[-1].outputs[0].logprobs, whole.outputs[0].logprobs)
        assert outputs[-1].outputs[0].text == whole.outputs[0].text
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        for before, after in itertools.pairwise(outputs):
            assert after.outputs[0].text.startswith(before.outputs[0].text)
            assert after.outputs[0].token_ids[: len(before.outputs[0].token_ids)] == before.outputs[0].token_ids
            assert len(before.outputs[0].logprobs) == len(before.outputs[0].token_ids)
        deltas = await read(llm, "def f(x):", replace(params, output_kind=DELTA))
        assert [deltas[-1].finished, *[output.has_more for output in deltas]] == [True] + [True] * (len(deltas) - 1) + [
            False
        ]
        completions = [output.outputs[0] for output in deltas]
        assert "".join(each.text for each in completions) == whole.outputs[0].text
        assert [t for each in completions for t in each.token_ids] == whole.outputs[0].token_ids
        assert_close([entry for each in completions for entry in each.logprobs], whole.outputs[0].logprobs)
        assert completions[-1].cumulative_logprob == pytest.approx(whole.outputs[0].cumulative_logprob, abs=1e-4)
        [final] = await read(llm, "def f(x):", replace(params, output_kind=FINAL))
        assert final.outputs[0].text == whole.outputs[0].text
        assert final.outputs[0].token_ids == whole.outputs[0].token_ids

    serve(task)


def test_many_tasks_get_what_each_would_get_alone():
    prompts = ["import os\n", "def f(x):", "class A:\n", "for i in range(", "x = 1", "return "]
    texts = [expected(prompt).outputs[0].text for prompt in prompts]

    async def task(llm):
        results = await asyncio.gather(*(read(llm, prompt, GREEDY) for prompt in prompts * 3))
        assert [outputs[-1].outputs[0].text for outputs in results] == texts * 3

    serve(task)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_several_completions_and_searches_come_whole(kind):
    drawn = SamplingParams(n=2, seed=3, max_tokens=8, ignore_eos=True)
    best = replace(drawn, best_of=3)
    search = BeamSearchParams(2, 6, ignore_eos=True).to_sampling_params()
    wholes = [expected("x = 1", params) for params in (drawn, best, search)]

    async def task(llm):
        for params, whole in zip((drawn, best, search), wholes, strict=True):
            outputs = await read(llm, "x = 1", replace(params, output_kind=kind))
            assert outputs[-1].finished
            assert not any(output.finished for output in outputs[:-1])
            if kind is not DELTA:
                assert [o.token_ids for o in outputs[-1].outputs] == [o.token_ids for o in whole.outputs]
            for completion in whole.outputs if kind is DELTA else ():
                parts = [each for output in outputs for each in output.outputs if each.index == completion.index]
                assert "".join(part.text for part in parts) == completion.text
                assert parts[-1].finish_reason is completion.finish_reason
                assert parts[-1].cumulative_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
                assert parts[-1].score == (completion.score and pytest.approx(completion.score, abs=1e-4))

    serve(task)


def test_leaving_the_loop_aborts_the_request():
    async def task(llm):
        async for output in llm.generate("x = 1", LONG):
            assert not output.finished
            break
        while llm.num_unfinished:
            await asyncio.sleep(0)
        assert (await idle(llm)).num_used_blocks == 0
        assert (await llm.stats()).num_output_tokens < 200

    serve(task)


@pytest.mark.parametrize("is_read", [False, True])
def test_cancelling_a_task_aborts_its_request(is_read):
    async def task(llm):
        begun = asyncio.Event()

        async def consume():
            async for _ in llm.generate("x = 1", LONG, "mine"):
                begun.set()

        consumer = asyncio.create_task(consume())
        if is_read:
            await begun.wait()
        else:
            await asyncio.sleep(0)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert llm.num_unfinished == 0
        [output] = await read(llm, "x = 1", replace(GREEDY, output_kind=FINAL), request_id="mine")
        assert output.outputs[0].token_ids == tokens, "the id is free, and the other one's tokens are dropped"

    tokens = expected("x = 1").outputs[0].token_ids
    serve(task)


def test_an_aborted_request_gets_a_last_output():
    async def task(llm):
        async with await llm.open("x = 1", LONG, "a") as stream:
            await anext(stream)
            assert await llm.abort("a")
            rest = [output async for output in stream]
            assert rest[-1].outputs[0].finish_reason is FinishReason.ABORT
            assert not await llm.abort(["a", "b"])

    serve(task)


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, DELTA])
def test_a_consumer_that_does_not_read_is_aborted(kind):
    async def task(llm):
        async with await llm.open("x = 1", replace(LONG, output_kind=kind), "a", max_unread_tokens=10) as stream:
            await anext(stream)
            while llm.num_unfinished:
                await asyncio.sleep(0)
            [last] = [output async for output in stream]
            assert last.outputs[0].finish_reason is FinishReason.ABORT
            assert "tokens were not read: at most 10 wait" in last.error
            assert 11 <= len(last.outputs[0].token_ids) < 200
        assert (await idle(llm)).num_output_tokens < 200

    serve(task)


def test_a_read_that_is_cancelled_loses_nothing():
    async def run():
        stream = RequestStream(Request("a", "x", [1], replace(GREEDY, output_kind=DELTA), 0), lambda name: None, 100)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task reads"):
            await anext(stream)
        stream.take(CompletionDelta("a", 0, "b", [2]), 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        stream.take(CompletionDelta("a", 0, "c", [3]), 2)
        output = await anext(stream)
        assert (output.outputs[0].text, output.outputs[0].token_ids, output.has_more) == ("bc", [2, 3], True)

    asyncio.run(run())


def test_what_is_refused_leaves_nothing():
    async def task(llm):
        for prompt, params, match in [
            ("", GREEDY, "the prompt is empty"),
            ("x", SamplingParams(n=9), "n=9 is more than max_num_seqs=4"),
            ("x", {"temperature": 0}, "expected SamplingParams"),
            ({"prompt_token_ids": [10**9]}, GREEDY, "expected token ids"),
        ]:
            with pytest.raises(ValueError, match=match):
                await read(llm, prompt, params, request_id="a")
        with pytest.raises(ValueError, match="request_id='' is not valid"):
            await read(llm, "x", GREEDY, request_id="")
        async with await llm.open("x = 1", GREEDY, "a"):
            with pytest.raises(ValueError, match="'a' is already in use"):
                await llm.open("x = 1", GREEDY, "a")
        await read(llm, "x = 1", GREEDY, request_id="a")

    serve(task)


def test_the_end_of_the_engine_reaches_every_stream():
    async def task(llm):
        stream = await llm.open("x = 1", LONG)
        other = asyncio.create_task(read(llm, "y = 2", LONG))

        def die(engine):
            raise SystemExit("killed")

        with pytest.raises(SystemExit):
            await llm.ask(die)
        with pytest.raises(EngineDeadError, match="SystemExit: killed"):
            [_ async for _ in stream]
        with pytest.raises(EngineDeadError):
            await other
        with pytest.raises(EngineDeadError, match="SystemExit: killed"):
            await llm.check_health()
        with pytest.raises(EngineDeadError):
            await llm.open("x = 1")
        with pytest.raises(EngineDeadError):
            await llm.stats()
        await llm.drain(0)

    serve(task)


def test_a_request_whose_text_cannot_be_made_ends_with_an_error_alone(monkeypatch):
    decode = TokenDecoder.decode
    ids = template().tokenizer.encode("x = 1")

    def broken(self, token_ids, **kwargs):
        if token_ids[: len(ids)] == ids:
            raise LookupError("no such token")
        return decode(self, token_ids, **kwargs)

    text = expected("def f(x):").outputs[0].text
    monkeypatch.setattr(TokenDecoder, "decode", broken)

    async def task(llm):
        bad, good = await asyncio.gather(read(llm, "x = 1", GREEDY), read(llm, "def f(x):", GREEDY))
        assert bad[-1].outputs[0].finish_reason is FinishReason.ERROR
        assert "LookupError: no such token" in bad[-1].error
        assert good[-1].outputs[0].text == text

    serve(task)


def test_draining_finishes_requests_and_takes_no_more():
    async def task(llm):
        stream = await llm.open("x = 1", GREEDY)
        drained = asyncio.create_task(llm.drain(TIMEOUT_S))
        assert [output async for output in stream][-1].outputs[0].finish_reason is FinishReason.LENGTH
        await drained
        assert llm.health().state is HealthState.STOPPED
        with pytest.raises(EngineDeadError, match="takes no more requests"):
            await llm.open("x = 1", GREEDY)

    serve(task)


def test_pins_questions_and_pictures():
    prefix = "class Stack:\n    def push(self, item):\n"

    async def task(llm):
        pinned = await llm.pin_prefix(prefix)
        picture = await llm.snapshot()
        assert picture.blocks.count(BlockUse.PINNED) == len(next(iter(picture.pins.values())))
        assert picture.blocks[0] == BlockUse.RESERVED
        assert len(picture.blocks) == picture.stats.num_blocks + 1
        async with await llm.open(prefix + "x", LONG, "a") as stream:
            output = await anext(stream)
            assert output.num_cached_tokens > 0
            [request] = (await llm.snapshot()).requests
            assert (request.request_id, request.state) == ("a", "running")
            assert request.num_cached_tokens == output.num_cached_tokens
            assert not await llm.reset_prefix_cache()
        await llm.unpin(pinned)
        await idle(llm)
        assert (await llm.snapshot()).blocks.count(BlockUse.CACHED) > 0
        assert await llm.reset_prefix_cache()
        assert (await llm.snapshot()).blocks.count(BlockUse.CACHED) == 0
        assert llm.latest_stats.num_blocks == picture.stats.num_blocks
        with pytest.raises(ValueError, match="not pinned"):
            await llm.unpin(pinned)

    serve(task)


def test_listeners_see_every_step_once():
    async def task(llm):
        seen = []
        llm.listen(seen.append)
        await read(llm, "x = 1", GREEDY, request_id="a")
        assert [request_id for output in seen for request_id in output.started] == ["a"]
        assert sum(len(delta.token_ids) for output in seen for delta in output.deltas) == 12
        assert [result.request_id for output in seen for result in output.finished] == ["a"]
        seen.clear()
        llm.listen(lambda output: 1 / 0)
        async with await llm.open("x = 1", LONG, "left"):
            pass
        await idle(llm)
        assert [result.request_id for output in seen for result in output.finished] == ["left"]
        assert len((await read(llm, "x = 1", GREEDY))[-1].outputs[0].token_ids) == 12

    serve(task)


def test_one_event_loop_follows_another():
    llm = AsyncLLM.from_llm(fresh())
    try:
        for _ in range(2):
            [output] = asyncio.run(read(llm, "x = 1", replace(GREEDY, output_kind=FINAL)))
            assert output.outputs[0].token_ids
    finally:
        llm.shutdown()


def test_an_llm_gives_its_engine_away_once_it_has_no_requests():
    llm = fresh()
    stream = llm.stream("x = 1", GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="1 requests are unfinished"):
        AsyncLLM.from_llm(llm)
    stream.close()
    served = AsyncLLM.from_llm(llm)
    served.shutdown()
    with pytest.raises(RuntimeError, match="has handed its engine over"):
        llm.generate("x = 1", GREEDY)


def test_it_is_made_with_the_arguments_of_an_llm():
    assert inspect.signature(AsyncLLM.__init__) == inspect.signature(LLM.__init__)
    with pytest.raises(ValueError, match="block_size=0"):
        AsyncLLM(block_size=0, use_tqdm=False)


def test_what_waits_for_a_busy_loop_is_read_at_once_and_in_order():
    def delta(token_id):
        return StepOutput(deltas=[CompletionDelta("a", 0, "b", [token_id])])

    async def task(llm):
        dispatcher, seen = llm._dispatcher, []
        async with await llm.open("x = 1", replace(LONG, output_kind=DELTA), "other") as other:
            await anext(other)  # the loop is known
            stream = RequestStream(Request("a", "x", [1], GREEDY, 0), lambda name: None, 8)
            stream.on_arrival = lambda: seen.append([delta.token_ids for delta in stream.read_now()[0]])
            dispatcher._hand_over(delta(1))  # of an earlier request of this id
            dispatcher._arrivals.put(stream)
            dispatcher._hand_over(delta(2))
            dispatcher._hand_over(delta(3))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert seen == [[[2], [3]]]
            dispatcher._hand_over(delta(4))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert seen == [[[2], [3]], [[4]]]
            dispatcher._release("a")
        await idle(llm)

    serve(task)


def test_one_step_may_bring_more_than_may_be_left_unread():
    async def run():
        stream = RequestStream(Request("a", "x", [1], replace(GREEDY, output_kind=DELTA, n=2), 0), lambda name: None, 3)
        assert stream.take(CompletionDelta("a", 0, "b", [2, 2]), 1)
        assert stream.take(CompletionDelta("a", 1, "c", [3, 3]), 1)
        assert (await anext(stream)).has_more
        assert stream.take(CompletionDelta("a", 0, "b", [2, 2]), 2)
        assert not stream.take(CompletionDelta("a", 1, "c", [3, 3]), 3)
        assert {output.finish_reason for output in (await anext(stream)).outputs} == {"abort"}

    asyncio.run(run())
