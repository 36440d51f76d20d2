"""A user's code, for pyright: public names keep their types through the lazy imports. Nothing runs this file."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import numpy as np

import jpaged
from jpaged import LLM, AsyncLLM, BlockManager, CompletionDelta, KVCache, RequestOutput, SamplingParams


def generate() -> str:
    llm = LLM()
    outputs = llm.generate(["def add(a, b):"], SamplingParams(temperature=0.8))
    assert_type(outputs, list[RequestOutput])
    for delta in llm.stream("import os"):
        assert_type(delta, CompletionDelta)
    return outputs[0].outputs[0].text


def hold_blocks() -> KVCache:
    blocks = BlockManager(num_blocks=64, block_size=16)
    assert_type(blocks.block_table("a"), list[int])
    batch = blocks.batch([("a", 0, 4)], num_tokens=8, num_rows=2, max_blocks=4)
    assert_type(batch.kv_lens, np.ndarray)
    return KVCache.allocate(num_blocks=64, num_layers=1, num_kv_heads=4, head_dim=16, block_size=16)


async def generate_in_a_loop() -> str:
    llm, text = AsyncLLM(max_num_seqs=8), ""
    async for output in llm.generate("def add(a, b):", SamplingParams(temperature=0.8)):
        assert_type(output, RequestOutput)
        text = output.outputs[0].text
    AsyncLLM(max_num_sequences=8)  # pyright: ignore[reportCallIssue]
    return text


def misspell() -> None:
    SamplingParams(temprature=1.0)  # pyright: ignore[reportCallIssue]
    jpaged.LMM  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
