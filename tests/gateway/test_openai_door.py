"""The OpenAI door: the `openai` package and plain HTTP through a real gateway."""

import json
from importlib.metadata import version

import numpy as np
import openai
import pytest

EOS = 1
TEXT = "the quick brown fox – naïve 漢字 👩‍🚀 jumps"
MESSAGES = [{"role": "user", "content": "hi"}]


def sent_prompts(gateway):
    return [np.frombuffer(submit.prompt_token_ids, "<i4").tolist() for submit in gateway.engine.submits]


def test_completion(gateway, tokenizer):
    token_ids = gateway.engine.say("the quick fox")
    completion = gateway.openai.completions.create(model="tiny", prompt="hello", user="me", n=1, best_of=1)
    [choice] = completion.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "the quick fox", "stop")
    assert (completion.object, completion.model) == ("text_completion", "tiny")
    assert completion.usage.completion_tokens == len(token_ids)
    assert completion.usage.prompt_tokens == len(tokenizer.encode("hello").ids)
    assert completion.usage.total_tokens == len(token_ids) + len(tokenizer.encode("hello").ids)
    assert gateway.engine.submits[0].sampling_params.max_tokens == 16


def test_prompts_of_every_form(gateway, tokenizer):
    gateway.engine.say("fox")
    two = [tokenizer.encode("the").ids, tokenizer.encode("dog").ids]
    forms = {"the": two[:1], ("the", "dog"): two, (7, 8): [[7, 8]], ((7, 8), (9,)): [[7, 8], [9]]}
    for prompt, expected in forms.items():
        gateway.engine.submits.clear()
        completion = gateway.openai.completions.create(model="tiny", prompt=json.loads(json.dumps(prompt)))
        assert sent_prompts(gateway) == expected
        assert [(c.index, c.text) for c in completion.choices] == [(i, "fox") for i in range(len(expected))]
        assert completion.usage.prompt_tokens == sum(map(len, expected))


def test_streamed_completion(gateway):
    token_ids = gateway.engine.say(TEXT)
    options = {"include_usage": True}
    stream = gateway.openai.completions.create(
        model="tiny", prompt="a", stream=True, stream_options=options, max_tokens=99
    )
    chunks = list(stream)
    texts = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(texts) == TEXT
    assert len(texts) > 10
    assert "�" not in "".join(texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(texts) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_streamed_completion_of_several_prompts(gateway):
    gateway.engine.say("the quick fox")
    stream = gateway.openai.completions.create(model="tiny", prompt=["a", "b", "c"], stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["the quick fox"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_echo(gateway, stream):
    gateway.engine.say(" fox")

    def text_of(**options):
        answer = gateway.openai.completions.create(model="tiny", echo=True, stream=stream, **options)
        return "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text

    assert text_of(prompt="the <|user|>") == "the <|user|> fox"
    assert text_of(prompt=[0, 39, 40]) == "CD fox"
    assert text_of(prompt="the", max_tokens=0) == "the"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_ends_by_length_whatever_the_token_left_out(gateway, stream):
    body = {"model": "tiny", "prompt": "the", "echo": True, "max_tokens": 0, "stream": stream}
    named = {"stop_token_ids": [EOS], "ignore_eos": True}
    for extra in ({}, named):
        answer = gateway.openai.completions.create(**body, extra_body=extra)
        choice = (list(answer)[-1] if stream else answer).choices[0].model_dump()
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_completion_logprobs(gateway, tokenizer):
    gateway.engine.say("the 漢 fox")
    logprobs = gateway.openai.completions.create(model="tiny", prompt="a", logprobs=2).choices[0].logprobs
    text = "the 漢 fox"
    assert logprobs.tokens[0] == "the"
    assert logprobs.tokens[-1] == "<|eos|>"
    assert "bytes:\\xe6" in logprobs.tokens
    assert logprobs.token_logprobs == [-1.5] * len(logprobs.tokens)
    assert logprobs.top_logprobs[0] == {"A": -0.5, "B": -1.5, "the": -1.5}
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[-1] == len(text)
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_echo_with_logprobs_scores_the_prompt(gateway):
    gateway.engine.say(" fox")
    answer = gateway.openai.completions.create(model="tiny", prompt=[39, 40], echo=True, logprobs=1, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "CD"
    assert logprobs.tokens == ["C", "D"]
    assert logprobs.token_logprobs == [None, -1.5]
    assert logprobs.top_logprobs == [None, {"A": -0.5, "D": -1.5}]
    assert logprobs.text_offset == [0, 1]
    assert answer.usage.completion_tokens == 0


def test_minus_infinity_is_a_number(gateway):
    gateway.engine.say("fox", logprobs_of=[float("-inf")] * 4)
    answer = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
    assert answer.choices[0].logprobs.content[0].logprob == -9999


def test_chat(gateway, tokenizer):
    token_ids = gateway.engine.say("the quick fox")
    answer = gateway.openai.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        ],
        max_completion_tokens=50,
        response_format={"type": "text"},
        extra_body={"top_k": 5, "priority": 3, "request_id": "mine"},
    )
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "the quick fox")
    assert choice.finish_reason == "stop"
    assert answer.id == "chatcmpl-mine"
    assert answer.usage.completion_tokens == len(token_ids)
    rendered = "<|bos|><|system|>be brief<|eos|><|user|>hi<|eos|><|assistant|>"
    assert sent_prompts(gateway) == [tokenizer.encode(rendered, add_special_tokens=False).ids]
    [submit] = gateway.engine.submits
    assert (submit.priority, submit.sampling_params.top_k, submit.sampling_params.max_tokens) == (3, 5, 50)


def test_chat_without_a_bound_may_use_the_context(gateway):
    gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES)
    [prompt] = sent_prompts(gateway)
    assert gateway.engine.submits[0].sampling_params.max_tokens == gateway.settings.max_model_len - len(prompt)


def test_streamed_chat(gateway):
    token_ids = gateway.engine.say(TEXT)
    stream = gateway.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == TEXT
    assert len(texts) > 10
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_logprobs(gateway):
    token_ids = gateway.engine.say("the 漢")
    answer = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == len(token_ids)
    assert (content[0].token, content[0].bytes, content[0].logprob) == ("the", list(b"the"), -1.5)
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("A", -0.5), ("B", -1.5)]
    assert b"".join(bytes(entry.bytes) for entry in content[:-1]).decode() == "the 漢"


def test_streamed_logprobs_are_whole(gateway):
    token_ids = gateway.engine.say("the 漢 fox")
    stream = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, stream=True)
    rows = [chunk.choices[0].logprobs for chunk in stream]
    assert sum(len(row.content) for row in rows if row is not None) == len(token_ids)


def test_prompt_logprobs_and_token_ids(gateway):
    token_ids = gateway.engine.say("the fox")
    extra = {"prompt_logprobs": 1, "return_token_ids": True}
    answer = gateway.openai.completions.create(model="tiny", prompt=[39, 40], extra_body=extra)
    choice = answer.choices[0].model_dump()
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["40"] == {"logprob": -1.5, "rank": 2, "decoded_token": "D"}
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([39, 40], token_ids)
    chat = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra).model_dump()
    assert chat["prompt_token_ids"] == sent_prompts(gateway)[1]
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    assert chat["choices"][0]["token_ids"] == token_ids


@pytest.mark.parametrize("first", ["漢", "fox"])  # the first token of the one has no text of its own
def test_streamed_prompt_logprobs_and_token_ids(gateway, first):
    token_ids = gateway.engine.say(first)
    extra = {"prompt_logprobs": 1}
    stream = gateway.openai.completions.create(model="tiny", prompt=[39, 40], stream=True, extra_body=extra)
    assert len(next(iter(stream)).choices[0].model_dump()["prompt_logprobs"]) == 2
    stream.close()
    extra = {"return_token_ids": True}
    stream = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, extra_body=extra)
    chunks = [chunk.model_dump() for chunk in stream]
    assert chunks[0]["prompt_token_ids"] == sent_prompts(gateway)[1]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == token_ids


def test_add_special_tokens(gateway, tokenizer):
    for add in (True, False):
        extra = {"add_special_tokens": add}
        gateway.openai.completions.create(model="tiny", prompt="fox", extra_body=extra)
        gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
    plain = tokenizer.encode("fox", add_special_tokens=False).ids
    with_bos, chat_with_two, without_bos, chat = sent_prompts(gateway)
    assert (with_bos, without_bos) == ([0, *plain], plain)
    assert chat_with_two == [0, *chat]


def test_stop_strings(gateway, eventually):
    gateway.engine.say("the lazy dog sleeps here", hold_after=20)
    answer = gateway.openai.completions.create(model="tiny", prompt="a", stop=["zzz", "g sl"], max_tokens=50)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("the lazy do", "stop")
    assert choice.model_dump()["stop_reason"] == "g sl"
    eventually(lambda: gateway.engine.stops == [gateway.engine.submits[0].handle])
    assert not gateway.engine.cancels  # it has ended as it should


def test_text_held_back_comes_when_no_stop_string_follows(gateway):
    gateway.engine.say("the lazy dog sl")
    stream = gateway.openai.completions.create(model="tiny", prompt="a", stop="dog sleeps", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the lazy dog sl"


def test_length_is_the_finish_reason(gateway):
    gateway.engine.say("the quick brown fox")
    assert (
        gateway.openai.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].finish_reason == "length"
    )


def test_models(gateway):
    models = gateway.openai.models.list().data
    assert [(model.id, model.object) for model in models] == [("tiny", "model"), ("tiny-alias", "model")]
    assert gateway.openai.models.retrieve("tiny").model_dump()["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError):
        gateway.openai.models.retrieve("other")


def test_health_version_and_text(gateway, tokenizer):
    assert gateway.http.get("/health").status_code == 200
    assert gateway.http.get("/version").json() == {"version": version("octavo")}
    answer = gateway.http.post("/tokenize", json={"prompt": "the fox", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("the fox").ids
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
    assert answer["token_strs"][0] == "<|bos|>"
    chat = gateway.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert tokenizer.decode(chat["tokens"], skip_special_tokens=False) == "<|bos|><|user|>hi<|eos|><|assistant|>"
    answer = gateway.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert answer["prompt"] == "<|bos|>the fox"


def test_the_last_event_is_done(gateway):
    gateway.engine.say("fox")
    with gateway.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_sampling_parameters_reach_the_engine_resolved(gateway):
    body = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"9": 2.5, "10": -100},
        "seed": 11,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "bad_words": ["fox"],
        "logprobs": 3,
        "prompt_logprobs": 1,
        "priority": -4,
    }
    assert gateway.http.post("/v1/completions", json={"prompt": "a", **body}).status_code == 200
    body |= {"logprobs": True, "top_logprobs": 3, "messages": MESSAGES}
    assert gateway.http.post("/v1/chat/completions", json=body).status_code == 200
    for submit in gateway.engine.submits:
        sent = submit.sampling_params
        assert submit.priority == -4
        assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p, sent.seed) == (0.5, 0.25, 7, 0.125, 11)
        assert (sent.presence_penalty, sent.frequency_penalty, sent.repetition_penalty) == (1, -1, 1.5)
        assert np.frombuffer(sent.logit_bias_token_ids, "<i4").tolist() == [9, 10]
        assert np.frombuffer(sent.logit_bias_values, "<f4").tolist() == [2.5, -100]
        assert np.frombuffer(sent.stop_token_ids, "<i4").tolist() == [5]
        assert (sent.max_tokens, sent.min_tokens) == (9, 2)
        assert len(sent.bad_words) == 2  # at the start of a text, and after a space
        assert (sent.num_logprobs, sent.num_prompt_logprobs) == (3, 1)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (2, "the fox "), (4, "the fox the lazy")])
def test_no_stop_string_ends_it_before_min_tokens(gateway, tokenizer, min_tokens, expected):
    text = "the fox the lazy dog"
    assert [tokenizer.decode([i]) for i in gateway.engine.say(text)[:2]] == ["the", " fox"]
    extra = {"min_tokens": min_tokens}
    answer = gateway.openai.completions.create(model="tiny", prompt="a", stop=["the", " dog"], extra_body=extra)
    assert answer.choices[0].text == expected


def test_special_tokens_and_the_stop_token_are_shown_when_asked_for(gateway, tokenizer):
    fox = tokenizer.token_to_id("Ġfox")
    gateway.engine.say("the<|user|> fox")
    gateway.engine.answer.token_ids.pop()  # the named stop token ends it
    extra = {"stop_token_ids": [fox]}
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    for options, expected in (({}, "the"), (shown, "the<|user|> fox")):
        answer = gateway.openai.completions.create(model="tiny", prompt="a", extra_body=extra | options)
        assert answer.choices[0].text == expected
        assert answer.choices[0].model_dump()["stop_reason"] == fox
