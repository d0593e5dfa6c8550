"""Detokenization token by token: the text of a full decode, and never half a character."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.gateway.detokenizer import ByteLevelVocabulary, WindowDetokenizer
from octavo.gateway.text import TextModel
from tokenizers import decoders, models, normalizers

SAMPLES = "the quick fox – naïve 漢字 👩‍🚀\u200d ﷽ \n\t é e\u0301"
pieces = st.lists(st.one_of(st.sampled_from(SAMPLES.split(" ")), st.text(max_size=5)), max_size=8)


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces are U+2581, what has no token falls back to its bytes, the first space is dropped."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁fox", "the", "e", "é", "漢"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(tokenizer):
    return tokenizer, TextModel(tokenizer, is_byte_level=True, chat_template=None)


@pytest.fixture(scope="module")
def sentencepiece():
    tokenizer = sentencepiece_tokenizer()
    return tokenizer, TextModel(tokenizer, is_byte_level=False, chat_template=None)


def streamed(detokenizer, token_ids, cuts):
    """The deltas, the tokens coming in groups of the sizes of `cuts`, then one by one."""
    deltas, start = [], 0
    sizes = iter(cuts)
    while start < len(token_ids):
        size = next(sizes, 1)
        deltas.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return [*deltas, detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(deadline=None, derandomize=True)
@given(pieces=pieces, cuts=st.lists(st.integers(1, 5)), skip=st.booleans())
def test_deltas_of_text_are_the_text(request, kind, pieces, cuts, skip):
    tokenizer, text_model = request.getfixturevalue(kind)
    token_ids = tokenizer.encode(" ".join(pieces), add_special_tokens=False).ids
    deltas = streamed(text_model.new_detokenizer(skip), token_ids, cuts)
    full = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(deltas) == full
    if "�" not in full:
        assert not any("�" in delta for delta in deltas)


@settings(deadline=None, derandomize=True)
@given(token_ids=st.lists(st.integers(0, 330)), skip=st.booleans())
def test_any_tokens_of_a_byte_level_vocabulary(byte_level, token_ids, skip):
    """Malformed bytes too, and ids that the tokenizer does not know; only a cut character at the end is left out."""
    tokenizer, text_model = byte_level
    text = "".join(streamed(text_model.new_detokenizer(skip), token_ids, []))
    full = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert full.startswith(text)
    assert full[len(text) :] in ("", "�")


@settings(deadline=None, derandomize=True)
@given(token_ids=st.lists(st.integers(0, 264)))
def test_malformed_bytes_do_not_spoil_what_follows(sentencepiece, token_ids):
    tokenizer, text_model = sentencepiece
    words = [tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁fox")]
    text = "".join(streamed(text_model.new_detokenizer(True), token_ids + words, []))
    assert text.endswith("the fox")


def test_a_character_waits_for_its_last_byte(byte_level):
    tokenizer, text_model = byte_level
    token_ids = tokenizer.encode("👩", add_special_tokens=False).ids
    assert len(token_ids) == 4
    assert streamed(text_model.new_detokenizer(True), token_ids, []) == ["", "", "", "👩", ""]
    assert "".join(streamed(text_model.new_detokenizer(True), token_ids[:3], [])) == ""


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("Ġfox", b" fox"),
        ("Ã©", "é".encode()),
        ("\xad", "\xad".encode()),  # no character of the byte alphabet: an added token, which is plain text
        ("<漢>", "<漢>".encode()),
        (None, b""),
    ],
)
def test_bytes_of_a_byte_level_token(token, expected):
    class OneToken:
        def id_to_token(self, token_id):
            return token

    assert ByteLevelVocabulary(OneToken(), frozenset()).bytes_of(0, skip_special_tokens=True) == expected


def test_the_window_stays_short(sentencepiece):
    """The cost of a token does not grow with the text."""

    class CountingTokenizer:
        longest = 0

        def decode(self, token_ids, skip_special_tokens):
            self.longest = max(self.longest, len(token_ids))
            return sentencepiece[0].decode(token_ids, skip_special_tokens=skip_special_tokens)

    counting = CountingTokenizer()
    detokenizer = WindowDetokenizer(counting, frozenset(), True)
    streamed(detokenizer, sentencepiece[0].encode("the 字 fox " * 50).ids, [])
    assert counting.longest <= 8
