"""The model in the box: what ships, its corpus and tokenizer, its evaluation and its training loop."""

import json
import math
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from jpaged.demo import train
from jpaged.demo.corpus import END_OF_TEXT, HELD_OUT_PERCENT, SourceFile, read_source_files, train_tokenizer
from jpaged.demo.evaluate import bits_per_byte, complete, token_nats
from jpaged.models import LlamaForCausalLM, load_config, load_model
from jpaged.sharding import make_mesh

MODEL = Path(train.__file__).parent / "model"
RESULT = Path(__file__).parents[2] / "bench" / "results" / "demo_training.json"
TINY = train.Recipe(
    steps=40, batch_size=2, context_len=16, vocab_size=300, hidden_size=128, intermediate_size=64, num_layers=1
)
CODE = '''\
class Stack:
    """A last-in, first-out collection."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def __len__(self):
        return len(self.items)
'''


def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(TINY.model_config(), dtype=jnp.float32, rngs=nnx.Rngs(0))


def held_out_name(prefix: str, *, is_held_out: bool) -> str:
    return next(name for i in count() if SourceFile(name := f"{prefix}{i}.py", "").is_held_out == is_held_out)


@pytest.fixture(scope="module")
def shipped() -> tuple[LlamaForCausalLM, Tokenizer]:
    model = load_model(MODEL, load_config(MODEL), jnp.float32, make_mesh(1), use_tqdm=False)
    return model, Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_shipped_checkpoint_is_whole_and_at_most_8_megabytes():
    names = {path.name for path in MODEL.iterdir()}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert names == tokenizer_files | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_shipped_card_states_the_committed_result():
    result = json.loads(RESULT.read_text())
    card = (MODEL / "README.md").read_text()
    assert f"**{result['curve'][-1]['library_bits']:.3f} bits per byte**" in card
    assert result["corpus_sha256"] in card
    assert result["device"] in card
    assert result["recipe"] == {name: getattr(train.Recipe(), name) for name in result["recipe"]}


def test_shipped_model_predicts_python(shipped):
    model, tokenizer = shipped
    ids = tokenizer.encode(CODE).ids
    bits = bits_per_byte(model, [[0, *ids]], len(CODE), batch_size=1)
    assert 0.2 < bits < 1.5
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    assert bits_per_byte(model, [[0, *shuffled]], len(CODE), batch_size=1) > 2 * bits


def test_shipped_model_indents_the_body_of_a_method(shipped):
    model, tokenizer = shipped
    prompt = tokenizer.encode(CODE + "\n    def peek(self):\n").ids
    drawn = complete(model, prompt, num_tokens=1, temperature=1e-4)
    assert tokenizer.decode(drawn) == " " * 8


def test_transformers_reads_the_shipped_tokenizer_and_its_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "def f():\n\treturn  '\N{SNOWMAN}'\r\n    \n  # \x00\x7f é"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    turns = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "    return x"}]
    said = "def f(x):\n    return x"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == said
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == said + "\n"


@given(st.text(max_size=60))
def test_tokenizer_gives_back_any_text(text):
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


TRAINED = train_tokenizer([CODE], 300)


def test_tokenizer_is_the_same_each_time():
    assert train_tokenizer([CODE] * 3, 300).to_str() == train_tokenizer([CODE] * 3, 300).to_str()


def test_tokenizer_keeps_line_breaks_indentation_and_words_apart():
    tokenizer = train_tokenizer([CODE] * 100, 400)
    assert tokenizer.encode("):\n        self.items").tokens == ["):", "Ċ", "Ġ" * 8, "self", ".", "items"]


def test_split_depends_on_the_path_alone_and_holds_out_its_share():
    files = [SourceFile(f"package/module{i}.py", "") for i in range(4000)]
    held_out = [file for file in files if file.is_held_out]
    assert abs(100 * len(held_out) / len(files) - HELD_OUT_PERCENT) < 1
    assert all(SourceFile(file.path, "other text").is_held_out for file in held_out)
    assert [SourceFile(path, "").is_held_out for path in ("statistics.py", "heapq.py")] == [True, False]


def test_tests_are_told_from_the_library_by_their_directory():
    assert SourceFile("test/test_json/test_decode.py", "").is_test
    assert SourceFile("idlelib/idle_test/htest.py", "").is_test
    assert not SourceFile("unittest/test.py", "").is_test


def test_reading_keeps_python_once_and_skips_the_rest(tmp_path):
    contents = {
        "b.py": b"x = 1\n",
        "a.py": "y = 'é'\n".encode(),
        "copy.py": b"x = 1\n",
        "python2.py": b"print 1\n",
        "latin.py": b"# \xe9\n",
        "empty.py": b"\n",
        "encodings/table.py": b"z = 1\n",
        "site-packages/other.py": b"z = 2\n",
        "_sysconfigdata_here.py": b"z = 3\n",
        "notes.txt": b"z = 4\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert [(file.path, file.text) for file in read_source_files(tmp_path)] == [
        ("a.py", "y = 'é'\n"),
        ("b.py", "x = 1\n"),
    ]


def test_reading_a_directory_without_python_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Python source"):
        read_source_files(tmp_path)


def test_bits_per_byte_counts_every_token_once():
    model = tiny_model()
    rng = np.random.default_rng(0)
    sequences = [[0, *rng.integers(1, 300, size).tolist()] for size in (1, 15, 16, 17, 40)]
    one_window = nnx.jit(token_nats)
    nats = 0.0
    for ids in sequences:
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            padded = jnp.asarray([window + [0] * (17 - len(window))], jnp.int32)
            nats += float(one_window(model, padded)[0, : len(window) - 1].sum())
    assert bits_per_byte(model, sequences, 100, batch_size=3) == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_token_nats_see_only_earlier_tokens_of_their_own_window():
    model = tiny_model()
    windows = jax.random.randint(jax.random.key(0), (2, 17), 1, 300)
    nats = nnx.jit(token_nats)
    changed = nats(model, windows.at[1, 8].set(0).at[0, 16].set(0)) - nats(model, windows)
    expected = np.zeros((2, 16), bool)
    expected[0, 15] = True
    expected[1, 7:] = True
    np.testing.assert_array_equal(np.abs(changed) > 1e-6, expected)


@pytest.mark.parametrize("library_share", [0.0, 1.0])
def test_windows_are_consecutive_and_start_in_their_part(library_share):
    stream = train.Stream(jnp.arange(200, dtype=jnp.uint16), jnp.int32(120))
    windows = np.asarray(train.draw_windows(stream, jax.random.key(0), 500, 17, library_share))
    np.testing.assert_array_equal(np.diff(windows), 1)
    first, last = (0, 119) if library_share else (120, 183)
    assert (windows[:, 0].min(), windows[:, 0].max()) == (first, last)


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = train.learning_rates(np.array([0.0, 0.01, 0.02, 0.51, 1.0, 1.5]), peak=2.0)
    np.testing.assert_allclose(rates, [0, 1, 2, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"hidden_size": 96}, {"vocab_size": 256}, {"vocab_size": 2**17}, {"dropout": 1.0}]
)
def test_a_recipe_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        train.Recipe(**wrong)


def test_training_lowers_the_loss_and_writes_a_checkpoint_that_loads(tmp_path):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    for i, prefix in enumerate(("module", "test/test_")):
        for is_held_out in (False, True):
            text = CODE.replace("Stack", f"Stack{i}{is_held_out}") * 3
            (library / held_out_name(prefix, is_held_out=is_held_out)).write_text(text)
    out, report_path = tmp_path / "out", tmp_path / "report.json"
    options = ["--stdlib", str(library), "--out", str(out), "--report", str(report_path), "--evaluate-every", "20"]
    for name in ("steps", "batch_size", "context_len", "vocab_size", "hidden_size", "intermediate_size", "num_layers"):
        options += ["--" + name.replace("_", "-"), str(getattr(TINY, name))]
    train.main(options)

    report = json.loads(report_path.read_text())
    first, last = report["curve"]
    assert (first["step"], last["step"], report["tokens_seen"]) == (20, 40, 40 * 2 * 16)
    assert last["train_nats"] < first["train_nats"] < math.log(300)
    assert last["library_bits"] < first["library_bits"]
    model = load_model(out, load_config(out), jnp.bfloat16, make_mesh(1), use_tqdm=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    files = [file for file in read_source_files(library) if file.is_held_out and not file.is_test]
    ids = [[0, *tokenizer(file.text)["input_ids"], 0] for file in files]
    assert bits_per_byte(model, ids, files[0].num_bytes) == pytest.approx(last["library_bits"], rel=1e-3)
