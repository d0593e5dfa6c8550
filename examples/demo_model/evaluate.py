"""Asks a saved demo model what it never saw, decodes greedily, and reports the share of right answers.

python examples/demo_model/evaluate.py examples/demo_model/demo --device cpu
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from arithmetic import SUM_QUESTIONS, held_out_pairs, sum_answer
from corpus import FAMILIES
from documents import BEGIN, Exchange, question_prompt
from transformers import AutoTokenizer, LlamaForCausalLM

_BATCH = 1024  # prompts
_FAMILY_EXCHANGES = 256
_OTHER_FAMILIES = ("difference", "product", "comparison", "sort", "reverse", "count", "small_talk", "unknown")
_SAMPLE_QUESTIONS = (
    "What is 27 + 15?", "Tell me a story about a fox.", "What is Octavo?", "What does the coordinator do?",
    "Sort 42, 7, 93, 18.", "Reverse this list: moon, river, tea.", "Count from 5 to 12.", "Who are you?",
)  # fmt: skip
_SAMPLE_TEXTS = ("Once upon a time", "Octavo is", "36 + 48 =")


class Answerer:
    """A saved model that answers batches of prompts greedily."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self._model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        self._device = device

    def answer(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), _BATCH):
            texts += self._answer_batch(list(prompts[start : start + _BATCH]), max_new_tokens)
        return texts

    @torch.inference_mode()
    def _answer_batch(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        inputs = self._tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self._device)
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def held_out_sums() -> list[Exchange]:
    """Each held-out pair twice: as most people ask, and in one of the other phrasings, in turn."""
    exchanges = []
    for index, (a, b) in enumerate(held_out_pairs()):
        other = SUM_QUESTIONS[1 + index % (len(SUM_QUESTIONS) - 1)]
        exchanges += [Exchange(q.format(a=a, b=b), sum_answer(a, b)) for q in (SUM_QUESTIONS[0], other)]
    return exchanges


def accuracy(answerer: Answerer, exchanges: Sequence[Exchange], max_new_tokens: int) -> float:
    """The share of answers that are right to the letter."""
    answers = answerer.answer([question_prompt(exchange.question) for exchange in exchanges], max_new_tokens)
    return sum(a == e.answer for a, e in zip(answers, exchanges, strict=True)) / len(exchanges)


def evaluate(directory: Path, device: torch.device) -> dict[str, object]:
    """Accuracies of a saved model, and some of its text to read."""
    sums = held_out_sums()
    in_float32 = accuracy(Answerer(directory, device, torch.float32), sums, max_new_tokens=16)
    answerer = Answerer(directory, device, torch.bfloat16)
    return {
        "held_out_sums_asked": len(sums),
        "held_out_sums_accuracy": {
            "float32": round(in_float32, 4),
            "bfloat16": round(accuracy(answerer, sums, max_new_tokens=16), 4),
        },
        "fresh_examples_accuracy_bfloat16": {
            name: round(accuracy(answerer, _fresh_exchanges(name), max_new_tokens=80), 4) for name in _OTHER_FAMILIES
        },
        "samples": _samples(answerer),
    }


def _fresh_exchanges(family: str) -> list[Exchange]:
    rng = random.Random(f"octavo-demo/evaluation/{family}")
    return [FAMILIES[family].exchange(rng) for _ in range(_FAMILY_EXCHANGES)]


def _samples(answerer: Answerer) -> dict[str, str]:
    prompts = [question_prompt(question) for question in _SAMPLE_QUESTIONS] + [BEGIN + text for text in _SAMPLE_TEXTS]
    answers = answerer.answer(prompts, max_new_tokens=160)
    return dict(zip((*_SAMPLE_QUESTIONS, *_SAMPLE_TEXTS), answers, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.directory, torch.device(arguments.device)), indent=2))


if __name__ == "__main__":
    main()
