"""Clients of others, unmodified, against a running server: OpenAI's, LangChain's, curl and lm-evaluation-harness."""

import json
import subprocess
import sys
import threading

import openai
import pytest

from jpaged.server import ServerSettings, create_app
from tests.server.conftest import TIMEOUT_S

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_completes(served, client):
    own = served.generate(PROMPT, max_tokens=6)
    made = client.completions.create(model="jpaged", prompt=PROMPT, max_tokens=6, temperature=0)
    assert made.choices[0].text == own.outputs[0].text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 6
    assert made._request_id
    stream = client.completions.create(model="jpaged", prompt=PROMPT, max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == own.outputs[0].text


def test_openai_chats(served, client):
    own = served.generate(f"{PROMPT}\n", max_tokens=6)
    made = client.chat.completions.create(model="jpaged", messages=MESSAGES, max_completion_tokens=6, temperature=0)
    assert made.choices[0].message.content == own.outputs[0].text
    assert made.choices[0].message.role == "assistant"
    with client.chat.completions.stream(
        model="jpaged",
        messages=MESSAGES,
        max_completion_tokens=6,
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "content.delta") == own.outputs[0].text
    last = [event for event in events if event.type == "chunk"][-1].chunk
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_openai_reads_logprobs_and_several_choices(client):
    made = client.completions.create(model="jpaged", prompt=PROMPT, max_tokens=4, logprobs=2, n=2, seed=1)
    assert [choice.index for choice in made.choices] == [0, 1]
    for choice in made.choices:
        assert choice.logprobs is not None
        assert choice.text.startswith("".join(choice.logprobs.tokens or [])[: len(choice.text)])
        assert len(choice.logprobs.top_logprobs or []) == 4
    chat = client.chat.completions.create(
        model="jpaged", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3, n=2, seed=1
    )
    for choice in chat.choices:
        assert choice.logprobs is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [3] * 4


def test_openai_raises_its_errors(served, client):
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.completions.create(model="jpaged", prompt=PROMPT, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt=PROMPT)
    assert error.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["jpaged"]


def test_openai_retries_when_the_queue_is_full(served):
    app, is_full = create_app(served.llm, ServerSettings(max_waiting_sequences=1)), threading.Event()
    admission, reasons, answers = app.state.server.admission, [], []
    admission._on_rejection = lambda reason: reasons.append(reason) or is_full.set()
    admission._has_places = lambda *demand: False

    async def go_on() -> None:
        del admission._has_places
        admission._admit()

    with served.serving(app) as (_, port):

        def ask() -> None:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=9) as client:
                made = client.completions.create(model="jpaged", prompt=[5, 6], max_tokens=2)
                answers.append(made.choices[0].finish_reason)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert is_full.wait(TIMEOUT_S)
        served.run(go_on())
        for thread in threads:
            thread.join()
    assert len(answers) == 2
    assert set(reasons) == {"max_waiting_sequences"}


def test_langchain_chats(served):
    from langchain_openai import ChatOpenAI

    own = served.generate(f"{PROMPT}\n", max_tokens=6)
    chat = ChatOpenAI(
        base_url=f"{served.base_url}/v1", api_key="none", model="jpaged", temperature=0, max_completion_tokens=6
    )
    assert chat.invoke(PROMPT).content == own.outputs[0].text
    assert "".join(str(chunk.content) for chunk in chat.stream(PROMPT)) == own.outputs[0].text


def test_curl_streams(served):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "stream": True, "temperature": 0})
    command = ["curl", "-sN", f"{served.base_url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("data: {")
    assert done.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.slow
def test_lm_eval_finds_the_loglikelihoods_of_the_engine(served, tmp_path):
    items = [
        {"question": f"def f{i}(x):\n    return", "choices": [" x", f" x + {i}", " None"], "answer": i % 3}
        for i in range(20)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    task = {
        "task": "items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "items.yaml").write_text(json.dumps(task))
    model = f"model=jpaged,base_url={served.base_url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "items", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([*command, "--log_samples"], check=True, capture_output=True, env=environment, cwd=tmp_path)
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 20
    for line in lines:
        question, choices = line["doc"]["question"], line["doc"]["choices"]
        found = [float(response[0][0]) for response in line["resps"]]
        assert found == pytest.approx([loglikelihood(served, question, each) for each in choices], abs=1e-4)


def loglikelihood(served, context: str, continuation: str) -> float:
    """The log-probability of a continuation, by the engine itself."""
    result = served.generate(context + continuation, max_tokens=1, prompt_logprobs=0)
    start = len(served.llm.tokenizer.encode(context))
    pairs = list(zip(result.prompt_token_ids, result.prompt_logprobs or (), strict=True))[start:]
    return sum(entry[token_id].logprob for token_id, entry in pairs)
