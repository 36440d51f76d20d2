"""Checkpoints by name: downloaded once, found again offline, and explained where they cannot be had."""

import errno
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from jpaged import LLM
from jpaged.cli.main import main as cli
from jpaged.cli.options import SERVER_OPTIONS, make_parser, server_settings
from jpaged.models import load_config, random_model, save_checkpoint
from jpaged.models.checkpoint.hub import CONFIG_FILES, TOKENIZER_FILES, find_checkpoint, repository_of
from jpaged.sharding import make_mesh
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.hub import COMMIT, Hub, serve_hub
from tests.support.tiny import tiny_config

NAME = "org/tiny-model"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The repository: a checkpoint, and much that is no part of one."""
    path = tmp_path_factory.mktemp("repository")
    config = tiny_config(vocab_size=257, num_layers=1, num_heads=2, num_kv_heads=1, max_position_embeddings=16)
    save_checkpoint(random_model(config, "float32", make_mesh(), seed=0), config, path)
    save_tokenizer(path)
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    copies = "original/model.safetensors", "onnx/config.json", "consolidated.safetensors"
    for other in ("modeling_tiny.py", ".hidden.py", "pytorch_model.bin", "model.pt", "README.md", *copies):
        (path / other).parent.mkdir(exist_ok=True)
        (path / other).write_bytes(b"no part of a checkpoint")
    return path


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub with that repository, and an empty cache."""
    with serve_hub(Hub({NAME: files})) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        use(hub.endpoint, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def use(endpoint, monkeypatch):
    """What the variable HF_ENDPOINT does when a process starts."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def refused(match, model=NAME, **options):
    with pytest.raises(ValueError, match=match):
        find_checkpoint(model, use_tqdm=False, **options)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
        ("org/name@main", "org/name", "main"),
        ("org/name_2.x@refs/pr/3", "org/name_2.x", "refs/pr/3"),
    ],
)
def test_a_name_is_an_organisation_a_repository_and_perhaps_a_revision(model, name, revision):
    assert repository_of(model) == (name, revision)
    assert str(repository_of(model)) == model


@pytest.mark.parametrize(
    "model",
    [None, "gpt2", "./org/name", "../name", "/org/name", "~/name", "a/b/c", "org/", "/name", "org/name@", Path("o/n")],
)
def test_other_strings_and_paths_are_directories(model):
    assert repository_of(model) is None
    if model is not None:
        assert find_checkpoint(model) == Path(model)


def test_a_directory_that_exists_wins(hub, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, NAME)
    assert find_checkpoint(NAME) == Path(NAME)
    assert not hub.requests


# Downloads ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_checkpoint_are_downloaded_and_nothing_else(hub):
    path = find_checkpoint(NAME, use_tqdm=False)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"}
    expected = {"config.json", "model.safetensors"} | tokenizer
    assert {file.name for file in path.iterdir()} == hub.asked_for() == expected
    assert load_config(path).vocab_size == 257


def test_weights_that_the_loader_does_not_read_are_not_downloaded(hub, files, tmp_path):
    path = tmp_path / "sharded"
    shutil.copytree(files, path, ignore=shutil.ignore_patterns("*.safetensors"))
    shards = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    others = "adapter_model.safetensors", "model.fp32-00001-of-00001.safetensors", "model.safetensors"
    for name in (*shards, *others):
        (path / name).write_bytes(b"weights")
    weight_map = {"a": shards[0], "b": shards[1], "c": "../model.pt", "d": "modeling_tiny.py"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors.index.fp32.json").write_text(json.dumps({"weight_map": {"a": others[1]}}))
    hub.repositories["org/sharded"] = path
    found = find_checkpoint("org/sharded", use_tqdm=False)
    assert {file.name for file in found.iterdir() if file.suffix in (".safetensors", ".py", ".pt")} == set(shards)
    hub.requests.clear()
    assert find_checkpoint(f"org/sharded@{COMMIT}", use_tqdm=False) == found
    assert not hub.requests


def test_a_commit_in_the_cache_is_not_requested_again(hub):
    path = find_checkpoint(f"{NAME}@{COMMIT}", use_tqdm=False)
    hub.requests.clear()
    assert find_checkpoint(f"{NAME}@{COMMIT}", use_tqdm=False) == path
    assert not hub.requests


def test_a_branch_is_looked_up_again_but_not_downloaded_again(hub):
    path = find_checkpoint(f"{NAME}@v1", use_tqdm=False)
    hub.requests.clear()
    assert find_checkpoint(f"{NAME}@v1", use_tqdm=False) == path
    assert hub.requests == [f"GET /api/models/{NAME}/revision/v1"]


def test_the_cache_serves_while_the_network_is_down(hub, monkeypatch):
    path = find_checkpoint(NAME, use_tqdm=False)
    use(_closed_endpoint(), monkeypatch)
    assert find_checkpoint(NAME, use_tqdm=False) == path


def test_starts_at_the_same_time_download_each_file_once(hub):
    with ThreadPoolExecutor(3) as starts:
        [path] = set(starts.map(lambda _: find_checkpoint(NAME, use_tqdm=False), range(3)))
    assert load_config(path).vocab_size == 257
    sent = [request for request in hub.requests if request.startswith("GET ") and "/resolve/" in request]
    assert sorted(sent) == sorted(set(sent))


@pytest.mark.parametrize("use_tqdm", [True, False])
def test_the_progress_bar_is_hidden_on_request(use_tqdm, hub, capsys):
    find_checkpoint(NAME, use_tqdm=use_tqdm)
    assert bool(capsys.readouterr().err) == use_tqdm


def test_a_tokenizer_is_downloaded_without_its_weights(hub):
    llm = LLM(tokenizer=NAME, num_blocks=4, max_num_seqs=1, max_model_len=16, warm_up=False, use_tqdm=False)
    assert llm.tokenizer.encode("ab") == [65, 66]
    assert "model.safetensors" not in hub.asked_for()
    assert find_checkpoint(NAME, files=TOKENIZER_FILES, use_tqdm=False).name == COMMIT


def test_info_downloads_the_configuration_alone(hub, capsys):
    assert cli(["info", "--model", NAME, "--num-blocks", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["vocab_size"] == 257
    assert hub.asked_for() == {"config.json"}


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_a_server_has_the_name_of_its_repository_unless_it_is_given_another(revision):
    arguments = ["serve", "--model", NAME + revision]
    named = make_parser().parse_args([*arguments, "--served-model-name", "other"])
    assert server_settings(named, SERVER_OPTIONS).served_model_name == "other"
    assert server_settings(make_parser().parse_args(arguments), SERVER_OPTIONS).served_model_name == NAME
    assert server_settings(make_parser().parse_args(["serve"]), SERVER_OPTIONS).served_model_name == "jpaged"


def test_generate_starts_from_a_name_and_the_second_time_offline_without_a_request(hub, capsys, monkeypatch):
    command = ["generate", "abc", "--temperature", "0", "--max-tokens", "1", "--model", NAME, "--num-blocks", "4"]
    assert cli(command) == 0
    first = capsys.readouterr().out
    assert "model.safetensors" in hub.asked_for()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli(command) == 0
    assert capsys.readouterr().out == first
    assert not hub.requests


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there_is_a_name_to_correct(hub):
    refused(r"org/missing is no directory, and http\S+ shows no such repository: correct the name", "org/missing")


def test_a_gated_repository_asks_for_terms_and_a_token(hub):
    hub.gated.add(NAME)
    refused(rf"{NAME} is gated, .*: accept its terms at http\S+/{NAME}, then run hf auth login, or set HF_TOKEN")


def test_a_token_opens_a_gated_repository(hub, monkeypatch):
    hub.gated.add(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (find_checkpoint(NAME, use_tqdm=False) / "config.json").exists()


def test_a_revision_that_is_not_there_is_named(hub):
    refused(rf"{NAME} has no revision 'v2': give a branch, a tag or a commit", f"{NAME}@v2")


def test_offline_without_a_copy_says_how_to_get_one(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(rf"HF_HUB_OFFLINE is set, and the cache in \S+ has no complete copy of {NAME}: unset it, run hf download ")
    assert not hub.requests


def test_advice_to_download_names_the_revision(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(rf"unset it, run hf download {NAME} --revision v1 where there is a network", f"{NAME}@v1")


def test_offline_with_a_part_of_a_copy_names_what_is_missing(hub, monkeypatch):
    find_checkpoint(NAME, files=CONFIG_FILES, use_tqdm=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(r"no complete copy of org/tiny-model \(.*tokenizer\.json.*\): unset it")


def test_no_network_says_so(hub, monkeypatch):
    use(_closed_endpoint(), monkeypatch)
    refused(r"http://127\.0\.0\.1:\d+ cannot be reached \(.*\), and the cache .*: check the network, run hf download")


def test_a_truncated_file_is_refused_and_downloaded_again(hub):
    hub.cut["model.safetensors"] = 10
    refused(rf"{NAME} cannot be downloaded \(OSError: .*size.*\): try again")
    hub.cut.clear()
    path = find_checkpoint(NAME, use_tqdm=False)
    assert (path / "model.safetensors").stat().st_size == (hub.repositories[NAME] / "model.safetensors").stat().st_size


def test_a_repository_of_pickles_says_so(hub, files, tmp_path):
    shutil.copytree(files, tmp_path / "pickles", ignore=shutil.ignore_patterns("*.safetensors"))
    hub.repositories["org/pickles"] = tmp_path / "pickles"
    refused(r"org/pickles has pickles only \(model\.pt\), .* look for a revision", "org/pickles")
    assert not {"pytorch_model.bin", "model.pt"} & hub.asked_for()


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"the disk of \S+cache is full: free space, or set HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "is full: free space"),
        (PermissionError(errno.EACCES, "Permission denied"), r"\S+cache cannot be written .*: set HF_HOME"),
    ],
)
def test_a_disk_that_takes_no_files_is_named(error, match, hub, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(match)


def _closed_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
