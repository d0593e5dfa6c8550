"""Several samples of a prompt at both doors: n and best_of, streamed and whole."""

import grpc
import httpx
import numpy as np
import openai
import pytest
from octavo.proto import engine_pb2, generation_pb2
from octavo.proto.generation_pb2 import GenerateRequest, SamplingParams, TokenIds

STOP, FINAL = generation_pb2.FINISH_REASON_STOP, generation_pb2.OUTPUT_MODE_FINAL
TEXTS = ["the quick fox", "jumps", "over the lazy dog"]
MESSAGES = [{"role": "user", "content": "hi"}]


def generate(gateway, final=False, prompt="a", **params):
    mode = FINAL if final else generation_pb2.OUTPUT_MODE_DELTA
    request = GenerateRequest(text=prompt, sampling_params=SamplingParams(**params), output_mode=mode)
    return list(gateway.generation.Generate(request))


def by_index(responses):
    """Text and ids of each sample."""
    texts, token_ids = {}, {}
    for response in responses:
        for output in response.outputs:
            texts[output.index] = texts.get(output.index, "") + output.text
            token_ids.setdefault(output.index, []).extend(output.token_ids)
    return texts, token_ids


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("tokens_per_message", [1, 3, 100])
def test_each_sample_has_its_own_tokens_and_end(gateway, final, tokens_per_message):
    samples = gateway.engine.say_samples(*TEXTS, tokens_per_message=tokens_per_message)
    responses = generate(gateway, final, n=3)
    texts, token_ids = by_index(responses)
    assert texts == dict(enumerate(TEXTS))
    assert token_ids == dict(enumerate(samples))
    ends = [output.index for response in responses for output in response.outputs if output.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].usage.completion_tokens == sum(map(len, samples))
    assert gateway.engine.submits[0].num_samples == 3
    assert not gateway.engine.cancels
    if final:
        assert [output.index for output in responses[0].outputs] == [0, 1, 2]


def test_samples_come_interleaved(gateway, loop):
    gateway.engine.say_samples(*TEXTS, hold_after=1)
    request = GenerateRequest(text="a", sampling_params=SamplingParams(n=3))
    call = gateway.generation.Generate(request)
    begun = set()
    while begun != {0, 1, 2}:  # none waits for another's end
        begun.update(output.index for output in next(call).outputs)
    loop.call(gateway.engine.hold.set)
    list(call)


def test_every_request_says_how_many_it_wants(gateway):
    generate(gateway)
    gateway.openai.completions.create(model="tiny", prompt="a")
    gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES)
    assert [submit.num_samples for submit in gateway.engine.submits] == [1, 1, 1]


def test_handles_follow_one_another_and_are_no_one_elses(gateway):
    gateway.engine.say_samples(*TEXTS)
    for n in (3, 1, 2):
        generate(gateway, n=n)
    ranges = [range(submit.handle, submit.handle + submit.num_samples) for submit in gateway.engine.submits]
    handles = [handle for one in ranges for handle in one]
    assert len(set(handles)) == 6


def test_prompt_logprobs_and_ids_come_once(gateway):
    gateway.engine.say_samples(*TEXTS)
    params = SamplingParams(n=3, prompt_logprobs=0, logprobs=0)
    request = GenerateRequest(token_ids=TokenIds(ids=[7, 8, 9]), sampling_params=params, return_prompt_token_ids=True)
    responses = list(gateway.generation.Generate(request))
    assert [len(response.prompt_logprobs) for response in responses] == [3] + [0] * (len(responses) - 1)
    assert [len(response.prompt_token_ids) for response in responses] == [3] + [0] * (len(responses) - 1)
    assert all(len(output.logprobs) == len(output.token_ids) for r in responses for output in r.outputs)


@pytest.mark.parametrize("final", [False, True])
def test_a_stop_string_ends_its_own_sample(gateway, eventually, final):
    gateway.engine.say_samples("the lazy dog sleeps here", "jumps over", "a lazy dog slept")
    texts, _ = by_index(generate(gateway, final, n=3, stop=["dog sl"]))
    assert texts == {0: "the lazy ", 1: "jumps over", 2: "a lazy "}
    first = gateway.engine.submits[0].handle
    eventually(lambda: sorted(gateway.engine.stops) == [first, first + 2])
    assert not gateway.engine.cancels


@pytest.mark.parametrize("final", [False, True])
def test_a_client_that_goes_frees_every_open_sample(gateway, eventually, final):
    gateway.engine.say_samples("the quick brown fox jumps", "the", "over the lazy dog", hold_after=2)
    mode = FINAL if final else generation_pb2.OUTPUT_MODE_DELTA
    request = GenerateRequest(text="a", sampling_params=SamplingParams(n=3), output_mode=mode)
    call = gateway.generation.Generate(request)
    eventually(lambda: gateway.engine.submits)
    first = gateway.engine.submits[0].handle
    if not final:
        ended = set()
        while ended != {1}:  # "the" and the end are the two tokens that come
            ended.update(output.index for output in next(call).outputs if output.finish_reason)
    call.cancel()
    ended = {first + 1}  # of a final answer's reader nobody knows when it hears of that
    eventually(lambda: set(gateway.engine.cancels) - ended == {first, first + 2})
    assert final or gateway.engine.cancels == [first, first + 2]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_the_first_token(gateway, eventually, path, stream):
    gateway.engine.say("the quick", hold_after=0)
    body = {"prompt": ["a", "b"]} if path == "completions" else {"messages": MESSAGES}
    with pytest.raises(httpx.ReadTimeout):
        gateway.http.post(f"/v1/{path}", json={**body, "n": 3, "stream": stream}, timeout=0.2)
    handles = [s.handle + index for s in gateway.engine.submits for index in range(3)]
    eventually(lambda: sorted(gateway.engine.cancels) == sorted(handles))


def test_a_refusal_is_one_of_all_samples(gateway):
    gateway.engine.fail(3, "too many", field="n")
    with pytest.raises(grpc.RpcError) as caught:
        generate(gateway, n=3)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    gateway.engine.say("fox")
    generate(gateway)
    first = gateway.engine.submits[0].handle
    assert set(gateway.engine.cancels) <= {first + 1, first + 2}  # of which the engine knows nothing


def test_the_loss_of_the_engine_ends_all_samples(start_gateway, loop):
    with start_gateway(max_outage_s=0) as gateway:
        gateway.engine.say_samples(*TEXTS, hold_after=1)
        call = gateway.generation.Generate(GenerateRequest(text="a", sampling_params=SamplingParams(n=3)))
        next(call)
        loop.call(gateway.engine.break_sessions)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_best_of_returns_the_likeliest_in_order(gateway):
    samples = gateway.engine.say_samples(*TEXTS, sample_logprobs=[-2.0, -0.25, -1.0])
    [response] = generate(gateway, final=True, n=2, best_of=3)
    assert [(output.index, output.text) for output in response.outputs] == [(0, TEXTS[1]), (1, TEXTS[2])]
    assert not any(output.logprobs for output in response.outputs)  # asked for within only
    assert response.usage.completion_tokens == sum(map(len, samples))  # as OpenAI counts
    [submit] = gateway.engine.submits
    assert (submit.num_samples, submit.sampling_params.HasField("num_logprobs")) == (3, True)
    assert submit.sampling_params.num_logprobs == 0


def test_best_of_goes_by_the_mean(gateway):
    gateway.engine.say_samples("the quick brown fox", "fox", sample_logprobs=[-1.0, -1.5])
    [response] = generate(gateway, final=True, best_of=2)  # the sum would choose the short one
    assert response.outputs[0].text == "the quick brown fox"


def test_logprobs_of_best_of_are_shown_when_asked_for(gateway):
    gateway.engine.say_samples(*TEXTS, sample_logprobs=[-2.0, -0.25, -1.0])
    [response] = generate(gateway, final=True, best_of=3, logprobs=1)
    assert {row.token.logprob for row in response.outputs[0].logprobs} == {-0.25}
    assert len(response.outputs[0].logprobs) == len(response.outputs[0].token_ids)


def test_best_of_n_draws_no_more_and_may_be_streamed(gateway):
    gateway.engine.say_samples(*TEXTS)
    assert by_index(generate(gateway, n=3, best_of=3))[0] == dict(enumerate(TEXTS))
    assert not gateway.engine.submits[0].sampling_params.HasField("num_logprobs")


def test_completions_number_their_choices_through(gateway, tokenizer):
    samples = gateway.engine.say_samples("fox", "the dog")
    answer = gateway.openai.completions.create(model="tiny", prompt=["a", "the"], n=2, logprobs=1)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "fox"), (1, "the dog"), (2, "fox"), (3, "the dog")]
    assert [len(c.logprobs.tokens) for c in answer.choices] == [len(one) for one in samples] * 2
    num_prompt_tokens = sum(len(tokenizer.encode(prompt).ids) for prompt in ("a", "the"))
    assert answer.usage.prompt_tokens == num_prompt_tokens  # once a prompt
    assert answer.usage.completion_tokens == 2 * sum(map(len, samples))


def test_streamed_completions(gateway):
    samples = gateway.engine.say_samples(*TEXTS)
    options = {"include_usage": True}
    stream = gateway.openai.completions.create(
        model="tiny", prompt=["a", "b"], n=3, stream=True, stream_options=options
    )
    texts, ends = [""] * 6, []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
    assert texts == TEXTS * 2
    assert sorted(ends) == list(range(6))
    assert chunk.usage.completion_tokens == 2 * sum(map(len, samples))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_is_in_each_choice(gateway, stream):
    gateway.engine.say_samples(" fox", " dog")
    answer = gateway.openai.completions.create(model="tiny", prompt=[39, 40], n=2, echo=True, logprobs=0, stream=stream)
    texts, tokens = ["", ""], [[], []]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == ["CD fox", "CD dog"]
    assert [one[:2] for one in tokens] == [["C", "D"]] * 2


def test_echo_alone_with_n(gateway):
    gateway.engine.say_samples(" fox", " dog")
    answer = gateway.openai.completions.create(model="tiny", prompt="the", n=2, echo=True, max_tokens=0)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("the", "length")] * 2
    assert answer.usage.completion_tokens == 0


def test_what_is_about_the_prompt_is_in_its_first_choice(gateway):
    gateway.engine.say_samples("fox", "dog")
    extra = {"prompt_logprobs": 0, "return_token_ids": True}
    answer = gateway.openai.completions.create(model="tiny", prompt=[[39, 40], [41]], n=2, extra_body=extra)
    choices = [choice.model_dump() for choice in answer.choices]
    assert [choice.get("prompt_token_ids") for choice in choices] == [[39, 40], None, [41], None]
    assert [len(choice.get("prompt_logprobs") or []) for choice in choices] == [2, 0, 1, 0]


def test_chat(gateway):
    samples = gateway.engine.say_samples(*TEXTS)
    answer = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, n=3)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (index, text, "stop") for index, text in enumerate(TEXTS)
    ]
    assert answer.usage.completion_tokens == sum(map(len, samples))


def test_streamed_chat(gateway):
    samples = gateway.engine.say_samples(*TEXTS)
    stream = gateway.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, roles, ends = {}, [], []
    for chunk in stream:
        for choice in chunk.choices:
            roles += [choice.index] if choice.delta.role else []
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends += [choice.index] if choice.finish_reason else []
    assert texts == dict(enumerate(TEXTS))
    assert sorted(roles) == sorted(ends) == [0, 1, 2]
    assert chunk.usage.completion_tokens == sum(map(len, samples))


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_best_of_over_http(gateway, path):
    gateway.engine.say_samples(*TEXTS, sample_logprobs=[-2.0, -0.25, -1.0])
    body = {"prompt": "a"} if path == "completions" else {"messages": MESSAGES}
    answer = gateway.http.post(f"/v1/{path}", json={**body, "best_of": 3}).json()
    [choice] = answer["choices"]
    text = choice["text"] if path == "completions" else choice["message"]["content"]
    assert (choice["index"], text, choice["logprobs"]) == (0, TEXTS[1], None)


def test_128_samples(gateway):
    token_ids = gateway.engine.say("fox")
    answer = gateway.openai.completions.create(model="tiny", prompt="a", n=128)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(index, "fox") for index in range(128)]
    assert answer.usage.completion_tokens == 128 * len(token_ids)


def test_seeds_are_the_engines_to_count_on(gateway):
    """The engine samples output i with seed + i, so one seed goes out."""
    generate(gateway, n=3, seed=7)
    assert gateway.engine.submits[0].sampling_params.seed == 7


def refused(gateway, body, path="completions"):
    body = {"prompt": "a", **body} if path == "completions" else {"messages": MESSAGES, **body}
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.openai.post(f"/{path}", body=body, cast_to=object)
    assert not gateway.engine.submits
    return caught.value.body["param"], caught.value.body["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("n", {"n": 2, "temperature": 0}),
        ("best_of", {"best_of": 2, "temperature": 0}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"n": 2, "best_of": 3, "stream": True}),
    ],
)
def test_what_does_not_go_together(gateway, path, param, body):
    named, message = refused(gateway, body, path)
    assert named == param
    assert param in message
    params = {name: value for name, value in body.items() if name != "stream"}
    with pytest.raises(grpc.RpcError) as caught:
        generate(gateway, **params)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert param in caught.value.details()


def test_many_choices_of_many_prompts_are_bounded(gateway):
    assert refused(gateway, {"prompt": ["a"] * 256, "n": 17})[0] == "n"
    assert refused(gateway, {"prompt": ["a"] * 256, "best_of": 17})[0] == "best_of"
    assert refused(gateway, {"prompt": [[5] * 200] * 256, "n": 16, "echo": True, "logprobs": 1})[0] == "echo"


def test_a_packed_cancel_of_an_unsent_request(gateway, loop):
    """Taken back whole before it is sent: the engine hears nothing of it."""
    from octavo.gateway.engine_outbox import EngineOutbox
    from octavo.proto import engine_pb2

    outbox = loop.call(EngineOutbox)
    outbox.submit(engine_pb2.Submit(handle=5, num_samples=3))
    outbox.submit(engine_pb2.Submit(handle=9, num_samples=1))
    assert not outbox.cancel(5, [5, 6, 7])
    message = loop.run(anext(outbox.messages()))
    assert [submit.handle for submit in message.submits] == [9]
    assert not message.cancel_handles
    assert outbox.cancel(9, [9])
    message = loop.run(anext(outbox.messages()))
    assert np.frombuffer(message.cancel_handles, "<u4").tolist() == [9]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_sample_that_fails_ends_the_request_and_cancels_the_others(gateway, loop, eventually, failed):
    gateway.engine.say_samples(*TEXTS, hold_after=1)
    call = gateway.generation.Generate(GenerateRequest(text="a", sampling_params=SamplingParams(n=3)))
    next(call)
    first = gateway.engine.submits[0].handle
    failure = engine_pb2.Failure(handle=first + failed, code=grpc.StatusCode.INTERNAL.value[0], message="no score")
    loop.call(gateway.engine.send, engine_pb2.SessionResponse(failures=[failure]))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "no score")
    eventually(lambda: gateway.engine.cancels == [first + index for index in range(3) if index != failed])
