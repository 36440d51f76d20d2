"""/tokenize, /detokenize and /tokenizer_info agree with the tokenizer."""


def test_text_goes_there_and_back(served):
    text = "def f(x):\n    return x"
    body = served.post("/tokenize", prompt=text, return_token_strs=True).json()
    ids = list(served.llm.tokenizer.encode(text))
    assert (body["tokens"], body["count"]) == (ids, len(ids))
    assert body["max_model_len"] == served.llm.max_model_len
    assert body["token_strs"] == served.llm.tokenizer.convert_ids_to_tokens(ids)
    assert served.post("/detokenize", tokens=ids).json() == {"prompt": text}


def test_conversations_are_tokenised_as_chats_are(served):
    messages = [{"role": "user", "content": "hello"}]
    chat = served.post("/v1/chat/completions", messages=messages, max_tokens=1, return_token_ids=True).json()
    assert served.post("/tokenize", messages=messages).json()["tokens"] == chat["prompt_token_ids"]


def test_the_tokenizer_is_described(served):
    info = served.wire.get("/tokenizer_info").json()
    assert info["eos_token"] == served.llm.tokenizer.eos_token
    assert info["chat_template"] == served.llm.tokenizer.chat_template


def test_mistakes_are_400(served):
    mistakes = [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": ""}),
        ("/tokenize", {"prompt": "a" * 7_000_000}),
        ("/tokenize", {"messages": [{"role": "x"}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [1] * (served.llm.max_model_len + 1)}),
    ]
    for path, fields in mistakes:
        response = served.post(path, **fields)
        assert response.status_code == 400, (path, fields, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_texts_of_others_are_tokenised_between_those_of_a_large_request(served, monkeypatch):
    texts = ["x" * 30, "y" * 30, "z" * 70, "a", "b" * 90, "c" * 20]
    codec, llm, pieces = served.server.codec, served.llm, []
    in_background = llm.in_background

    def noted(work):
        pieces.append(work)
        return in_background(work)

    whole = served.run(codec.encode(texts))
    monkeypatch.setattr("jpaged.server.text_codec.PIECE_CHARACTERS", 100)
    monkeypatch.setattr(llm, "in_background", noted)
    assert served.run(codec.encode(texts)) == whole
    assert len(pieces) == 4


def test_a_long_text_of_few_tokens_is_tokenised_whole(served, monkeypatch):
    text = "def mean(values):\n    return sum(values) / len(values)\n" * 30
    whole = list(served.llm.tokenizer.encode(text))
    assert len(whole) < served.llm.max_model_len < len(text)
    monkeypatch.setattr("jpaged.server.text_codec.LONG_TOKEN", 1)
    assert served.run(served.server.codec.encode([text])) == [whole]
