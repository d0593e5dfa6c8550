"""Documents as rows of token ids with labels, made by several processes.

Imports no torch: each process that makes shards imports this file, and torch would cost it seconds.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from corpus import Corpus
from documents import ASSISTANT, BEGIN, PAD, SPECIAL_TOKENS, SYSTEM, USER
from tokenizers import Tokenizer

ROW_LENGTH = 512  # tokens; whole documents, one after another, then padding
IGNORED = -100  # label without loss: torch's default ignore_index
_SHARD_DOCUMENTS = 10_000
_PAD_ID = SPECIAL_TOKENS.index(PAD)
_MARKER_IDS = [SPECIAL_TOKENS.index(token) for token in (PAD, BEGIN, SYSTEM, USER, ASSISTANT)]
_LEARNED_IDS = [SPECIAL_TOKENS.index(token) for token in (BEGIN, ASSISTANT)]


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows. Labels are the next tokens, or IGNORED; both int16 [num_rows, ROW_LENGTH]."""

    tokens: "np.ndarray[tuple[int, int], np.dtype[np.int16]]"
    labels: "np.ndarray[tuple[int, int], np.dtype[np.int16]]"


def build_rows(corpus: Corpus, tokenizer: Tokenizer, num_documents: int, num_processes: int) -> Rows:
    """The same rows for any number of processes."""
    num_shards = -(-num_documents // _SHARD_DOCUMENTS)
    sizes = [min(_SHARD_DOCUMENTS, num_documents - index * _SHARD_DOCUMENTS) for index in range(num_shards)]
    shards = [(corpus, tokenizer.to_str(), index, size) for index, size in enumerate(sizes)]
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _one_thread_each) as pool:
        tokens = np.concatenate(list(pool.map(_shard_rows, shards)))
    return Rows(tokens, labels_of(tokens))


def _one_thread_each() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _shard_rows(shard: tuple[Corpus, str, int, int]) -> np.ndarray:
    corpus, tokenizer_json, index, size = shard
    tokenizer = Tokenizer.from_str(tokenizer_json)
    texts = [document.text for document in corpus.shard(index, size)]
    return pack(encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))


def pack(documents: Iterable[Sequence[int]]) -> np.ndarray:
    """Rows of whole documents, int16 [num_rows, ROW_LENGTH]. A document longer than a row is cut at its end."""
    rows: list[list[int]] = [[]]
    for ids in documents:
        if rows[-1] and len(rows[-1]) + len(ids) > ROW_LENGTH:
            rows.append([])
        rows[-1].extend(ids[:ROW_LENGTH])
    return np.array([row + [_PAD_ID] * (ROW_LENGTH - len(row)) for row in rows], dtype=np.int16)


def labels_of(tokens: np.ndarray) -> np.ndarray:
    """Next tokens where the model speaks: in plain text and in the assistant's turns, with the token that ends them."""
    markers = np.where(np.isin(tokens, _MARKER_IDS), np.arange(tokens.shape[1]), 0)
    last_marker = np.take_along_axis(tokens, np.maximum.accumulate(markers, axis=1), axis=1)
    next_tokens = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], _PAD_ID)], axis=1)
    learned = np.isin(last_marker, _LEARNED_IDS) & (next_tokens != _PAD_ID)
    return np.where(learned, next_tokens, IGNORED).astype(np.int16)
