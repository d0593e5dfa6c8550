"""A tokenizer for models that have none, so that the HTTP door streams text as it does for a real model.

Every token id is one word of its own, so a server spends on a token what it spends on any other.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SPACE = "Ġ"  # how byte-level vocabularies write a space


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes tokenizer.json: byte-level, `vocab_size` tokens, no merges."""
    vocabulary = {f"{_SPACE}{index:x}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
