"""The training of the model in the box, on the Python source of a standard library: ``python -m jpaged.demo.train``."""

import argparse
import platform
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int32, PRNGKeyArray, UInt16
from tqdm import tqdm

from jpaged.demo.card import Evaluation, Report, describe, write_card, write_report, write_tokenizer
from jpaged.demo.corpus import END_OF_TEXT, Corpus, digest, read_corpus
from jpaged.demo.evaluate import Attention, bits_per_byte, complete, token_nats
from jpaged.models.checkpoint.weights import save_checkpoint
from jpaged.models.families.llama import LlamaConfig, LlamaForCausalLM
from jpaged.models.layers.rope import Rope

STEPS_PER_CALL = 20
_WARMUP = 0.02  # of the run
SAMPLE_PROMPT = "def fibonacci(n):"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a training run. Each field is an option of the script."""

    steps: int = _option(2000, "optimizer steps")
    minutes: float = _option(0.0, "end the schedule by this time if the steps take longer; 0: steps alone, repeatable")
    batch_size: int = _option(64, "windows a step")
    context_len: int = _option(1024, "tokens a window predicts")
    library_share: float = _option(0.5, "probability that a window comes from the library, not from its tests")
    dropout: float = _option(0.15, "rate for the output of every attention and for the final hidden state")
    learning_rate: float = _option(3e-3, "its peak, after a warm-up and before a cosine to zero")
    weight_decay: float = _option(0.1, "AdamW's, of matrices only")
    vocab_size: int = _option(2048, "tokens in the vocabulary")
    hidden_size: int = _option(256, "a multiple of 128: heads of 64, two to a KV head")
    intermediate_size: int = _option(640, "width of the feed-forward layers")
    num_layers: int = _option(5, "decoder layers")
    seed: int = _option(0, "of the initial weights, the windows and the dropout")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context_len", "intermediate_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not valid: expected 1 or more")
        if self.hidden_size < 128 or self.hidden_size % 128:
            raise ValueError(f"hidden_size={self.hidden_size} is not valid: expected a multiple of 128")
        if not 257 <= self.vocab_size <= 2**16:
            raise ValueError(f"vocab_size={self.vocab_size} is not valid: expected 257 (single bytes) to {2**16}")
        if not (0 <= self.dropout < 1 and 0 <= self.library_share <= 1):
            raise ValueError(f"dropout={self.dropout}, library_share={self.library_share}: expected shares of 1")

    def model_config(self) -> LlamaConfig:
        """Return the model's shape: tied embeddings, heads of 64, two query heads per KV head, bfloat16."""
        return LlamaConfig(
            architecture="LlamaForCausalLM",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.hidden_size // 64,
            num_kv_heads=self.hidden_size // 128,
            head_dim=64,
            max_position_embeddings=self.context_len,
            rms_norm_eps=1e-5,
            rope=Rope(64, 10000.0, self.context_len),
            dtype="bfloat16",
            eos_token_ids=(0,),
            bos_token_id=0,
            tie_word_embeddings=True,
        )


class Stream(NamedTuple):
    """The training tokens on the device, and the number of library tokens, which come first."""

    tokens: UInt16[Array, "corpus_len"]
    library_len: Int32[Array, ""]


class TrainState(NamedTuple):
    """Master weights in float32 and the optimizer's moments; donated to the call that advances them."""

    params: nnx.State
    opt_state: optax.OptState
    step: Int32[Array, ""]


TrainCall = Callable[[TrainState, Stream, PRNGKeyArray, Array], tuple[TrainState, Array]]


def learning_rates(progress: Float64[np.ndarray, "steps"], peak: float) -> Float32[np.ndarray, "steps"]:
    """Return a linear warm-up, then a cosine to zero, over the finished share of the run."""
    progress = np.clip(progress, 0.0, 1.0)
    cosine = 0.5 * (1 + np.cos(np.pi * (progress - _WARMUP) / (1 - _WARMUP)))
    return (peak * np.where(progress < _WARMUP, progress / _WARMUP, cosine)).astype(np.float32)


def draw_windows(
    stream: Stream, key: PRNGKeyArray, batch_size: int, window_len: int, library_share: float
) -> Int32[Array, "batch window"]:
    """Draw windows of consecutive tokens: from the library with probability ``library_share``, else from its tests."""
    choice_key, start_key = jax.random.split(key)
    last_start = stream.tokens.shape[0] - window_len
    is_library = jax.random.bernoulli(choice_key, library_share, (batch_size,))
    low = jnp.where(is_library, 0, jnp.minimum(stream.library_len, last_start))
    high = jnp.where(is_library, jnp.minimum(stream.library_len, last_start + 1), last_start + 1)
    starts = jax.random.randint(start_key, (batch_size,), low, high)
    return stream.tokens[starts[:, None] + jnp.arange(window_len)[None]].astype(jnp.int32)


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Make AdamW on gradients clipped to norm 1; the caller scales the updates by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
    )


def as_dtype(params: nnx.State, dtype: Any) -> nnx.State:
    """Convert the weights to another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def init_state(model: LlamaForCausalLM, recipe: Recipe) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure, and float32 master weights with the model's values."""
    graphdef, params = nnx.split(model)
    params = as_dtype(params, jnp.float32)
    return graphdef, TrainState(params, make_optimizer(recipe.weight_decay).init(params), jnp.int32(0))


def make_train_call(graphdef: nnx.GraphDef, recipe: Recipe, attention: Attention = "xla") -> TrainCall:
    """Make a jitted call that takes one step per learning rate, and returns each step's loss in nats a token.

    The model computes in bfloat16, from float32 weights.
    """
    optimizer = make_optimizer(recipe.weight_decay)

    def loss_of(params: nnx.State, windows: Int32[Array, "batch window"], key: PRNGKeyArray) -> Float32[Array, ""]:
        model = nnx.merge(graphdef, as_dtype(params, jnp.bfloat16))
        return token_nats(model, windows, dropout=recipe.dropout, key=key, attention=attention).mean()

    @partial(jax.jit, donate_argnums=0)
    def train_call(
        state: TrainState, stream: Stream, key: PRNGKeyArray, rates: Float32[Array, "steps"]
    ) -> tuple[TrainState, Float32[Array, "steps"]]:
        def step(state: TrainState, rate: Float32[Array, ""]) -> tuple[TrainState, Float32[Array, ""]]:
            window_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
            windows = draw_windows(stream, window_key, recipe.batch_size, recipe.context_len + 1, recipe.library_share)
            loss, grads = jax.value_and_grad(loss_of)(state.params, windows, dropout_key)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            return TrainState(params, opt_state, state.step + 1), loss

        return jax.lax.scan(step, state, rates)

    return train_call


def evaluate(model: LlamaForCausalLM, corpus: Corpus, *, is_test: bool) -> float:
    """Compute bits per byte of the held-out files, of the library or of its tests."""
    files = corpus.select(is_test=is_test, is_held_out=True)
    return bits_per_byte(model, corpus.encode(files), sum(file.num_bytes for file in files))


def train(
    corpus: Corpus,
    recipe: Recipe,
    *,
    evaluate_every: int = 1000,
    attention: Attention = "xla",
    on_evaluation: Callable[[LlamaForCausalLM, list[Evaluation]], None] = lambda model, curve: None,
) -> LlamaForCausalLM:
    """Train a model from scratch, with a progress bar.

    Args:
        corpus: corpus with a tokenizer of ``recipe.vocab_size``.
        recipe: settings of the run.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        attention: implementation of dense attention.
        on_evaluation: callback after each evaluation, with the model and all evaluations so far.

    Returns:
        The last weights, rounded to bfloat16 as in every evaluation.
    """
    model = LlamaForCausalLM(recipe.model_config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(recipe.seed))
    graphdef, state = init_state(model, recipe)
    call = make_train_call(graphdef, recipe, attention)
    tokens, library_len = corpus.training_stream()
    stream, key = Stream(jnp.asarray(tokens), jnp.int32(library_len)), jax.random.key(recipe.seed)
    curve: list[Evaluation] = []
    step, progress, next_evaluation, started = 0, 0.0, evaluate_every, time.monotonic()
    with tqdm(total=recipe.steps, unit="step", mininterval=1) as bar:
        while progress < 1:
            num_steps = min(STEPS_PER_CALL, recipe.steps - step)
            rates = learning_rates(progress + np.arange(num_steps) / recipe.steps, recipe.learning_rate)
            with jax.numpy_dtype_promotion("standard"):  # optax and the gradient of JAX's attention need promotion
                state, losses = call(state, stream, key, jnp.asarray(rates))
            train_nats, seconds = float(losses.mean()), time.monotonic() - started
            step += num_steps
            progress = max(step / recipe.steps, seconds / 60 / recipe.minutes if recipe.minutes else 0.0)
            if step >= next_evaluation or progress >= 1:
                model = nnx.merge(graphdef, as_dtype(state.params, jnp.bfloat16))
                library_bits, test_bits = (evaluate(model, corpus, is_test=is_test) for is_test in (False, True))
                curve.append(Evaluation(step, seconds, train_nats, library_bits, test_bits))
                on_evaluation(model, curve)
                next_evaluation += evaluate_every
            bar.update(num_steps)
            bar.set_postfix(nats=f"{train_nats:.3f}", held_out=f"{curve[-1].library_bits:.3f}" if curve else "later")
    return model


def save(directory: Path, model: LlamaForCausalLM, corpus: Corpus, report: Report) -> None:
    """Write a checkpoint directory: weights, configuration, tokenizer and card."""
    save_checkpoint(model, model.config, directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes the file private
    write_tokenizer(directory, corpus.tokenizer, model.config.max_position_embeddings)
    drawn = complete(model, corpus.tokenizer.encode(SAMPLE_PROMPT).ids, num_tokens=120)
    write_card(directory, report, SAMPLE_PROMPT + corpus.tokenizer.decode(drawn).partition(END_OF_TEXT)[0])


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jpaged.demo.train",
        description="Train the demo model and write it as a Hugging Face checkpoint with a model card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--stdlib", type=Path, default=stdlib, metavar="DIR", help="the library to learn from")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the run, with its curve, as JSON")
    parser.add_argument("--evaluate-every", type=int, default=1000, metavar="STEPS", help="also saves the checkpoint")
    parser.add_argument("--attention", choices=get_args(Attention), default="xla", help="cudnn: faster, NVIDIA only")
    parser.add_argument(
        "--corpus-name", default=f"CPython {platform.python_version()}", help="what the model card calls the library"
    )
    for option in fields(Recipe):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, type=type(option.default), default=option.default, help=option.metadata["help"])
    return parser.parse_args(args)


def _commit() -> str | None:
    """Return the commit of this file's checkout; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(args: Sequence[str] | None = None) -> None:
    options = parse_args(args)
    recipe = Recipe(**{option.name: getattr(options, option.name) for option in fields(Recipe)})
    corpus = read_corpus(options.stdlib, recipe.vocab_size)
    parts, corpus_sha256 = describe(corpus), digest(corpus.files)

    def record(model: LlamaForCausalLM, curve: list[Evaluation]) -> None:
        report = Report(
            corpus=options.corpus_name,
            corpus_sha256=corpus_sha256,
            parts=parts,
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
            commit=_commit(),
            recipe=asdict(recipe),
            num_parameters=sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
            steps=curve[-1].step,
            tokens_seen=curve[-1].step * recipe.batch_size * recipe.context_len,
            seconds=curve[-1].seconds,
            curve=curve,
        )
        save(options.out, model, corpus, report)
        if options.report:
            write_report(options.report, report)

    train(corpus, recipe, evaluate_every=options.evaluate_every, attention=options.attention, on_evaluation=record)
    print((options.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
