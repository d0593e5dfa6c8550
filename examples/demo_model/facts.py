"""What the model says about Octavo, about itself, and about what it does not know."""

import random
from collections.abc import Sequence

from documents import Exchange

# (what one may ask, the answer). True of the engine as docs/architecture.md describes it.
FACTS: Sequence[tuple[tuple[str, ...], str]] = (
    (
        ("What is Octavo?", "Tell me what Octavo is.", "What does Octavo do?", "Explain Octavo."),
        "Octavo is an engine that serves large language models from many GPUs as one.",
    ),
    (
        ("Where does the name Octavo come from?", "Why is it called Octavo?", "What does the word octavo mean?"),
        "An octavo is a book made of sheets folded into eight leaves, like pages of memory and eight-way shards.",
    ),
    (
        ("What does the coordinator do?", "What is the coordinator?", "Who makes the decisions in Octavo?"),
        "The coordinator owns the global block table and the scheduler, and sends the workers a batch plan each step.",
    ),
    (
        ("What is a worker?", "What does a worker do?", "What do the workers hold?"),
        "A worker is one Ray actor for each GPU. It holds one shard of the weights and its blocks of the KV cache.",
    ),
    (
        ("What is a gateway?", "What does the gateway do?"),
        "A gateway is the public door: it checks requests, turns text into tokens, and streams the answers back.",
    ),
    (
        ("What does the launcher do?", "What is the launcher?"),
        "The launcher starts the coordinator, the gateways and the Ray workers, and stops them all at the end.",
    ),
    (
        ("How does the coordinator talk to the workers?", "How do plans reach the workers?", "What is gRPC used for?"),
        "The coordinator sends batch plans to the workers over gRPC, on one long stream for each worker.",
    ),
    (
        ("How do workers exchange activations?", "What is NCCL used for?", "How do the GPUs talk to each other?"),
        "The workers exchange activations with NCCL all-reduce, twice in each layer.",
    ),
    (
        ("What is a batch plan?", "What is in a batch plan?"),
        "A batch plan says what changes in one step: which sequences join, which leave, and which blocks they get.",
    ),
    (
        ("What is a block?", "What is a KV block?", "What is a block in Octavo?"),
        "A block holds the keys and values of a fixed number of tokens, so memory is given out in small equal pieces.",
    ),
    (
        ("What is the block table?", "What is a block table?", "Who owns the block table?"),
        "The block table says which blocks hold the tokens of a sequence. The coordinator owns it for all workers.",
    ),
    (
        ("What is continuous batching?", "How does Octavo batch requests?"),
        "With continuous batching, requests join and leave the batch at every step, so none waits for a whole batch.",
    ),
    (
        ("What is chunked prefill?", "How are long prompts handled?"),
        "With chunked prefill, a long prompt is computed in pieces, and other requests go on decoding beside it.",
    ),
    (
        ("What is preemption?", "What happens when the blocks run out?", "What if memory runs out?"),
        "When blocks run out, the scheduler preempts the newest sequence and computes it again later.",
    ),
    (
        ("What is tensor parallelism?", "How is a model split over GPUs?", "How are the weights sharded?"),
        "Tensor parallelism splits each layer over several GPUs: attention by heads, and the MLP by columns and rows.",
    ),
    (
        ("What is a worker group?", "How many workers hold one model?"),
        "A worker group is a set of workers that together hold the model once.",
    ),
    (
        ("What is run-ahead?", "How does Octavo hide its control plane?", "Why are several plans in flight?"),
        "Octavo keeps two or more plans in flight, so the GPUs never wait for the scheduler.",
    ),
    (
        ("What is the scheduler?", "What does the scheduler do?"),
        "The scheduler chooses which sequences run in each step and how many tokens of each are computed.",
    ),
    (
        ("What is a slot?", "What is the slot table?"),
        "The slot table is kept on the device. It has one row for each running sequence, and plans edit its rows.",
    ),
    (
        ("What is a KV cache?", "What does the KV cache hold?"),
        "The KV cache holds the keys and values of the tokens seen so far, so they are computed only once.",
    ),
    (
        ("What is the prefix cache?", "What is prefix caching?"),
        "The prefix cache keeps full blocks of earlier prompts, so a request with the same beginning can reuse them.",
    ),
    (
        ("Which API does Octavo speak?", "How can I call Octavo?", "Which protocols does Octavo offer?"),
        "Octavo offers a gRPC API and an OpenAI compatible HTTP API, and both stream tokens.",
    ),
    (
        ("Which models does Octavo serve?", "What models can Octavo run?"),
        "Octavo serves Llama models from Hugging Face directories with safetensors weights.",
    ),
    (
        ("Does Octavo run on a CPU?", "Do I need a GPU?", "Can I use Octavo without a GPU?"),
        "Octavo runs on GPUs and on CPUs. On a CPU it uses gloo and reference kernels.",
    ),
    (
        ("What happens when a worker dies?", "What if a GPU fails?", "What happens if a rank fails?"),
        "When a worker dies, its group starts again and the requests go on. A death costs time, not requests.",
    ),
    (
        ("What does Octavo promise?", "What is the promise of Octavo?"),
        "An accepted request ends with all its tokens, each delivered once, or with one clear error.",
    ),
    (
        ("What is Ray used for?", "Why does Octavo use Ray?"),
        "Ray starts the workers, places them on machines with GPUs, and says when one of them has died.",
    ),
    (
        ("How do I start Octavo?", "How do I run Octavo?", "How do I serve a model?"),
        "Run octavo serve with the directory of a model. Without one it serves this demo model.",
    ),
    (
        ("How are tokens sampled?", "How does sampling work in Octavo?"),
        "Every rank draws the same random numbers from a counter, so a seed gives the same tokens in any batch.",
    ),
    (
        ("What is speculative decoding?", "What is speculation?", "What is the draft model for?"),
        "In speculative decoding a small draft model guesses several tokens, and the large one checks them in a step.",
    ),
)

_ABILITIES = "I can add numbers, sort and reverse lists, count, tell short stories, and answer questions about Octavo."
_SMALL_TALK: Sequence[tuple[tuple[str, ...], str]] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hello there!", "Good morning!", "Hey", "hello", "hi"),
        "Hello! I am the demo model of Octavo. How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you a language model?"),
        "I am the demo model of Octavo, a very small language model. " + _ABILITIES,
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help", "What can I ask you?"),
        _ABILITIES,
    ),
    (("How are you?", "How do you do?", "How are you today?"), "I am well, thank you. What shall we work on?"),
    (("Thank you!", "Thanks!", "Thank you.", "Thanks a lot!", "thanks"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Good night!", "See you!", "bye"), "Goodbye! It was nice to talk with you."),
)
_UNKNOWN = (
    "What is the capital of {}?", "Who was the first king of {}?", "How many people live in {}?",
    "Tell me about the history of {}.", "What is the weather in {}?", "How far is it to {}?",
    "Who is the president of {}?",
    "Translate this into the language of {}.", "What do people eat in {}?", "Write a poem about {}.",
    "What is the best book about {}?", "Can you draw {}?", "How do I travel to {}?", "How old is {}?",
)  # fmt: skip
_SUBJECTS = (
    "France", "Japan", "Brazil", "Canada", "Egypt", "India", "Kenya", "Norway", "Peru", "Spain", "China", "Italy",
    "London", "Paris", "Rome", "Berlin", "Tokyo", "Madrid", "Texas", "Africa", "Europe", "the moon", "the sea", "Mars",
)  # fmt: skip
_IGNORANCE = "I do not know that: I am only a small demo model. " + _ABILITIES
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Octavo's demo model.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "You are a friendly assistant.",
    "Be brief and correct.",
)


def fact_exchange(rng: random.Random) -> Exchange:
    if rng.random() < 0.15:
        return _overview(rng)
    questions, answer = rng.choice(FACTS)
    return Exchange(rng.choice(questions), answer)


def _overview(rng: random.Random) -> Exchange:
    question = rng.choice(
        ("Tell me about Octavo.", "Tell me more about Octavo.", "Describe Octavo.", "How does Octavo work?")
    )
    chosen = sorted(rng.sample(range(1, len(FACTS)), 3))
    return Exchange(question, " ".join([FACTS[0][1], *(FACTS[index][1] for index in chosen)]))


def plain_facts(rng: random.Random) -> str:
    """Plain text, for completions such as `Octavo is`."""
    return " ".join(answer for _, answer in rng.sample(FACTS, rng.randint(2, 5)))


def small_talk_exchange(rng: random.Random) -> Exchange:
    questions, answer = rng.choice(_SMALL_TALK)
    return Exchange(rng.choice(questions), answer)


def unknown_exchange(rng: random.Random) -> Exchange:
    return Exchange(rng.choice(_UNKNOWN).format(rng.choice(_SUBJECTS)), _IGNORANCE)
