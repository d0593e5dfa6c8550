"""What a training document is, and how a conversation becomes text: the chat template in Python."""

from collections.abc import Sequence
from dataclasses import dataclass

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)  # their ids are their positions here
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question of the user and the assistant's answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training text with the families of what it holds."""

    families: tuple[str, ...]
    text: str  # with its special tokens


def chat_prompt(messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The text of a conversation, as the tokenizer's chat template renders it."""
    turns = "".join(f"{ROLE_TOKENS[message['role']]}{message['content']}{END}" for message in messages)
    return BEGIN + turns + (ASSISTANT if add_generation_prompt else "")


def question_prompt(question: str) -> str:
    return chat_prompt([{"role": "user", "content": question}])


def conversation(system: str | None, exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def plain_text(text: str) -> str:
    """The training form of text without roles: what completions continue."""
    return BEGIN + text + END
