"""``jpaged serve`` and ``jpaged batch``, as users start them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import httpx
import pytest

from jpaged.cli import main as cli
from jpaged.cli.options import SERVER_OPTIONS, make_parser, model_aliases, server_settings
from jpaged.models import random_model, save_checkpoint
from jpaged.server import ServerSettings
from jpaged.sharding import make_mesh
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
SIZES = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--num-blocks", "20"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    config = tiny_config(vocab_size=257, num_layers=1, num_heads=2, num_kv_heads=1, eos_token_ids=(0,))
    save_checkpoint(random_model(config, "float32", make_mesh(), seed=0), config, path)
    save_tokenizer(path)
    return path


def test_serve_takes_requests_until_it_is_told_to_stop(checkpoint):
    command = ["serve", "--model", str(checkpoint), "--port", "0", "--served-model-name", "tiny", *SIZES]
    process = subprocess.Popen([sys.executable, "-m", "jpaged", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(found[1] for line in lines if (found := re.fullmatch(r"tiny is served at (http\S+)\n", line)))
        with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
            assert client.get("/ready").status_code == 200
            response = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 3})
            assert response.json()["usage"]["total_tokens"] == 6
        process.send_signal(signal.SIGTERM)
        log = "".join(lines)
        assert process.wait() == 0
        assert '"POST /v1/completions" 200' in log
    finally:
        process.kill()
        process.communicate()


def test_batch_writes_results_and_computes_nothing_twice(checkpoint, tmp_path, capsys):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "abc", "max_tokens": 3}
    source.write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}) + "\nb\n"
    )
    command = ["batch", str(source), str(destination), "--model", str(checkpoint), *SIZES]
    assert cli.main(command) == 0
    assert "2 of 2 requests are done, 1 of them with an error" in capsys.readouterr().err
    results = destination.read_text()
    assert len(results.splitlines()) == 2
    assert cli.main(command) == 0
    assert "all 2 requests are done" in capsys.readouterr().err
    assert destination.read_text() == results


def test_an_interrupted_batch_ends_quietly_and_says_what_is_done(checkpoint, tmp_path):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc", "ignore_eos": True}}
        for i in range(5000)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(source), str(destination), "--model", str(checkpoint), *SIZES]
    process = subprocess.Popen([sys.executable, "-m", "jpaged", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (destination.exists() and destination.stat().st_size):
            sleep(0.05)
        process.send_signal(signal.SIGINT)
        log = process.communicate()[1]
        assert process.returncode == 130
        num_done = len(destination.read_text().splitlines())
        assert f"{num_done} of 5000 requests are done, 0 of them with an error\n" in log
        assert "Traceback" not in log
        assert 0 < num_done < 5000
    finally:
        process.kill()
        process.wait()


def test_batch_tells_of_requests_that_the_engine_lost(checkpoint, tmp_path, capsys, monkeypatch):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "abc", "max_tokens": 3}
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}))
    command = ["batch", str(source), str(destination), "--model", str(checkpoint), *SIZES]
    with monkeypatch.context() as patch:
        patch.setattr("jpaged.server.answer.check_end", lambda result: 1 / 0)
        assert cli.main(command) == 1
    assert "1 of the errors are failures of the engine" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "1 of 1 requests are done, 0 of them with an error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["serve", "--port", "70000"], "--port 70000 is not valid: expected an integer from 0 to 65535"),
        (["serve", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask, and there is no key"),
        (["serve", "--host", "0.0.0.0"], "bind 127.0.0.1, or set --insecure"),
        (
            ["serve", "--host", "192.0.2.1", "--port", "8011", "--insecure"],
            "--host 192.0.2.1, --port 8011 cannot be bound",
        ),
        (["serve", "--unix-socket", "/nowhere/x"], "--unix-socket /nowhere/x cannot be bound: No such file"),
        (["batch", "/nowhere", "/tmp/out"], "No such file or directory: '/nowhere'"),
    ],
)
def test_mistakes_are_found_before_anything_loads(command, message, capsys, monkeypatch):
    monkeypatch.setattr("jpaged.cli.start.load_for_many", lambda args: pytest.fail("the model was loaded"))
    monkeypatch.delenv("JPAGED_API_KEY", raising=False)
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve"], ["batch", "a", "b"]])
def test_without_the_extra_the_command_says_what_to_install(command, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "jpaged.server.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(command) == 2
    assert "uvicorn is not installed, which a server needs: pip install 'jpaged[serve]'" in capsys.readouterr().err


def test_the_model_as_it_is_given_is_a_name_of_it_unless_it_is_given_one():
    parse = make_parser().parse_args
    assert model_aliases(parse(["serve", "--model", "/models/tiny"])) == ("/models/tiny",)
    assert model_aliases(parse(["serve", "--model", "/models/tiny", "--served-model-name", "x"])) == ()
    assert model_aliases(parse(["batch", "a", "b"])) == ()


def test_every_setting_of_the_server_is_an_option():
    args = make_parser().parse_args(["serve"])
    assert server_settings(args, SERVER_OPTIONS) == ServerSettings()
    origins = ["--allowed-origins", "http://a", "--allowed-origins", "http://b"]
    args = make_parser().parse_args(["serve", "--insecure", "--drain-timeout-s", "2.5", *origins])
    expected = ServerSettings(insecure=True, drain_timeout_s=2.5, allowed_origins=["http://a", "http://b"])
    assert server_settings(args, SERVER_OPTIONS) == expected


@pytest.mark.parametrize("origin", ["example.org", "https://", "https://example.org/", "", None])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    assert ServerSettings(allowed_origins=["*", "https://example.org:8443"])
    with pytest.raises(ValueError, match=r"a list of origins, each like https://example\.org"):
        ServerSettings(allowed_origins=[origin])
