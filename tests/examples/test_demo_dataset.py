"""Rows and labels: whole documents, and loss only where the model speaks."""

import numpy as np

# Ids by position in documents.SPECIAL_TOKENS.
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = range(6)


def test_only_the_assistants_turns_and_plain_text_are_learned(script):
    dataset = script("dataset")
    chat = [BEGIN, SYSTEM, 70, END, USER, 71, 72, END, ASSISTANT, 73, 74, END]
    plain = [BEGIN, 80, 81, END]
    tokens = dataset.pack([chat, plain])
    labels = dataset.labels_of(tokens)[0]
    ignored = dataset.IGNORED
    # After an answer, the model learns what may follow it; here the beginning of the next document.
    expected = [SYSTEM, *[ignored] * 7, 73, 74, END, BEGIN, 80, 81, END, ignored]
    assert labels[: len(expected)].tolist() == expected
    assert (labels[len(expected) :] == ignored).all()


def test_rows_hold_whole_documents(script):
    dataset = script("dataset")
    documents = [[BEGIN] + [100 + index] * (150 + index) + [END] for index in range(40)]
    rows = dataset.pack(documents)
    assert rows.dtype == np.int16
    assert rows.shape[1] == dataset.ROW_LENGTH
    text = [[int(token) for token in row if token != PAD] for row in rows]
    assert [token for row in text for token in row] == [token for ids in documents for token in ids]
    assert all(row[0] == BEGIN and row[-1] == END for row in text)
