"""The files beside the demo model's weights: tokenizer, model card, and record of the training."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from jpaged.demo.corpus import END_OF_TEXT, END_OF_TEXT_ID, HELD_OUT_PERCENT, Corpus

# A completion model in a chat reads the conversation as one source text, with a line break between messages.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '' if loop.last and not add_generation_prompt else '\n' }}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Part:
    """The size of one part of a corpus; the tokens include an end of text after each file."""

    files: int
    num_bytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses at one step: training loss in nats a token, held-out bits per byte."""

    step: int
    seconds: float
    train_nats: float
    library_bits: float
    test_bits: float


@dataclass(frozen=True, slots=True)
class Report:
    """One training run. ``parts`` are named "training" or "held out", "library" or "tests"."""

    corpus: str
    corpus_sha256: str
    parts: dict[str, Part]
    device: str
    jax: str
    commit: str | None
    recipe: dict[str, int | float]
    num_parameters: int
    steps: int
    tokens_seen: int
    seconds: float
    curve: list[Evaluation]

    @property
    def final(self) -> Evaluation:
        return self.curve[-1]


def describe(corpus: Corpus) -> dict[str, Part]:
    """Measure the four parts of a corpus."""
    parts = {}
    for is_held_out, use in ((False, "training"), (True, "held out")):
        for is_test, kind in ((False, "library"), (True, "tests")):
            files = corpus.select(is_test=is_test, is_held_out=is_held_out)
            tokens = sum(len(ids) - 1 for ids in corpus.encode(files))
            parts[f"{use} {kind}"] = Part(len(files), sum(file.num_bytes for file in files), tokens)
    return parts


def write_tokenizer(directory: Path, tokenizer: Tokenizer, context_len: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_len,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)
    special_ids = {f"{role}_token_id": END_OF_TEXT_ID for role in ("bos", "eos", "pad")}
    _write_json(directory / "generation_config.json", special_ids)


def write_report(path: Path, report: Report) -> None:
    """Write the run as JSON."""
    _write_json(path, asdict(report))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_card(directory: Path, report: Report, sample: str) -> None:
    """Write the model card, ``README.md``.

    Args:
        directory: directory of the checkpoint.
        report: record of the run that made the checkpoint.
        sample: a prompt and its completion.
    """
    recipe, final = report.recipe, report.final
    options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in recipe.items())
    parts = "\n".join(
        f"| {name} | {part.files:,} | {part.num_bytes:,} | {part.tokens:,} |" for name, part in report.parts.items()
    )
    shape = (
        f"`LlamaForCausalLM`: {recipe['num_layers']} layers of {recipe['hidden_size']}, feed-forward "
        f"{recipe['intermediate_size']}, {recipe['hidden_size'] // 64} query and {recipe['hidden_size'] // 128} KV "
        "heads of 64, tied embeddings, bfloat16"
    )
    (directory / "README.md").write_text(
        f"""---
language: [code]
library_name: transformers
pipeline_tag: text-generation
license: psf-2.0
tags: [python, code, jax, flax]
---
# The model in jpaged's box

A Llama-architecture model of {report.num_parameters / 1e6:.2f} million parameters that completes Python code.
It is here so that jpaged runs on a new machine without a download. What it writes looks like the standard library, and
is not to be trusted.

| | |
| --- | --- |
| architecture | {shape} |
| context | {recipe["context_len"]} tokens |
| tokenizer | byte-level BPE, {recipe["vocab_size"]} tokens; decoding gives back any text exactly |
| **held-out loss** | **{final.library_bits:.3f} bits per byte** (library files), {final.test_bits:.3f} (its tests) |

## Data
The Python source of {report.corpus}'s standard library without `site-packages`, codec tables (`encodings`), generated
documentation (`pydoc_data`) and build configuration: the files that are UTF-8 and parse, each text once.
{HELD_OUT_PERCENT}% of the files, chosen by a hash of their path, are held out, from the tokenizer too.
SHA-256 of the corpus: `{report.corpus_sha256}`.

| part | files | bytes | tokens |
| --- | --- | --- | --- |
{parts}

## Training
`python -m jpaged.demo.train {options}`

{report.steps:,} steps, {report.tokens_seen / 1e6:,.0f} million tokens seen, {report.seconds:.0f} s on {report.device}
with JAX {report.jax}. AdamW, warm-up and a cosine to zero, bfloat16 arithmetic on float32 weights. A window of tokens
comes from the library with probability {recipe["library_share"]:g}, otherwise from its tests.

Bits per byte: the bits of all tokens of the held-out files, ends of text included, over the files' bytes; with the
weights as stored, in bfloat16, in windows of {recipe["context_len"]} tokens that do not overlap. The script's default
options were chosen among a few by this loss.

## A sample
Drawn at temperature 0.5:

```python
{sample}
```

## Licence
Trained on CPython's standard library, which is under the Python Software Foundation License Version 2
(https://docs.python.org/3/license.html). The model may repeat passages of it.
""",
        encoding="utf-8",
    )
