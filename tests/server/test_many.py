"""Many requests at once: each gets what it would get alone."""

import asyncio

PROMPT = "def add(a, b):"
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}


def test_tokens_are_the_same_alone_and_among_200_others(served):
    async def ask(client, body) -> list[int]:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    async def task():
        async with served.client() as client:
            body = {"prompt": PROMPT} | DRAWN
            alone = await ask(client, body)
            others = [
                {"prompt": f"{i % 7 * 'x = '}{i}", "temperature": i % 3 / 2, "max_tokens": 1 + i % 9}
                for i in range(200)
            ]
            bodies = [*others[:100], body, *others[100:]]
            found = await asyncio.gather(*(ask(client, {"return_token_ids": True} | each) for each in bodies))
            return alone, found

    alone, found = served.run(task())
    assert len(alone) == DRAWN["max_tokens"]
    assert found[100] == alone
    assert len(found) == 201
