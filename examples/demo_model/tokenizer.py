"""The demo models' tokenizer: byte-level BPE trained on their text, every digit a token of its own.

Single digits let a small model add: each column of a sum is one token, and a carry is one step to the left.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from documents import ASSISTANT, BEGIN, END, PAD, ROLE_TOKENS, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 1536  # a multiple of every rank count; below what the text could fill, so rare words are in pieces
CONTEXT_LENGTH = 2048  # tokens

# Renders what documents.chat_prompt does; a role that training never saw is refused.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    + "".join(
        f"{{% {'if' if number == 0 else 'elif'} message['role'] == '{role}' %}}{{{{ '{token}' }}}}"
        for number, (role, token) in enumerate(ROLE_TOKENS.items())
    )
    + "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ message['content'] + eos_token }}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """The same texts give the same tokenizer, byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the texts fill {tokenizer.get_vocab_size()} of {VOCAB_SIZE} tokens: give more texts")
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers and `tokenizers` read them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
