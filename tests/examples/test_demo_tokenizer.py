"""The demo model's tokenizer and chat template: lossless, one token a digit, and the text that training saw."""

import asyncio

import pytest
import tokenizers
from octavo.gateway.text import load_text_model
from transformers import AutoTokenizer

CONVERSATION = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 27 + 15?"},
    {"role": "assistant", "content": "27 + 15 = 42."},
    {"role": "user", "content": "And 3 plus 4?"},
]


@pytest.fixture(scope="module")
def texts(script):
    return [document.text for document in script("corpus").Corpus(seed=0).shard(0, 12_000)]


@pytest.fixture(scope="module")
def directory(script, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    tokenizer = script("tokenizer").train_tokenizer(texts)
    script("tokenizer").save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_the_same_texts_give_the_same_bytes(script, texts, directory, tmp_path):
    script("tokenizer").save_tokenizer(script("tokenizer").train_tokenizer(texts), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize("text", ["What is 27 + 15?", " two  spaces\n\tand a tab", "naïve 猫 🦊 Ω", "<not special>"])
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_every_digit_is_a_token(tokenizer):
    assert [token for token in tokenizer.encode("1234+ 56").tokens if token.isdigit()] == list("123456")


def test_special_tokens_have_the_ids_that_labels_are_made_with(script, tokenizer):
    special = script("documents").SPECIAL_TOKENS
    assert [tokenizer.token_to_id(token) for token in special] == list(range(len(special)))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_chat_template_renders_the_training_text(script, directory, add_generation_prompt):
    expected = script("documents").chat_prompt(CONVERSATION, add_generation_prompt)
    transformers_tokenizer = AutoTokenizer.from_pretrained(directory)
    assert expected == transformers_tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=add_generation_prompt, tokenize=False
    )


async def _gateway_ids(directory):
    return await load_text_model(directory).encode_chat(
        CONVERSATION, add_generation_prompt=True, add_special_tokens=False
    )


def test_transformers_tokenizers_and_the_gateway_agree_on_ids(script, directory, tokenizer):
    text = script("documents").chat_prompt(CONVERSATION)
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    transformers_tokenizer = AutoTokenizer.from_pretrained(directory)
    rendered = transformers_tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=True)
    assert list(rendered["input_ids"]) == expected
    assert asyncio.run(_gateway_ids(directory)) == expected
    assert transformers_tokenizer("Once upon a time")["input_ids"] == tokenizer.encode("Once upon a time").ids


def test_plain_text_begins_with_the_begin_token(script, tokenizer):
    assert tokenizer.encode("Octavo is").tokens[0] == script("documents").BEGIN


def test_an_unknown_role_is_refused(directory):
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        AutoTokenizer.from_pretrained(directory).apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
