"""A tokenizer for tiny checkpoints: token 0 ends a text, and each byte is a token of its own."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NUM_TOKENS = 257


def save_tokenizer(path: Path, chat_template: str | None = None) -> None:
    """Save it as Hugging Face's own tokenizers are saved."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=chat_template)
    fast.save_pretrained(path)
