"""Many requests at once: order, bound, failure."""

import threading

import pytest
from octavo.errors import InvalidArgumentError, UnavailableError
from octavo.launch.bulk import BulkClient, BulkRequest
from octavo.launch.prompts import RequestOptions, build_request
from octavo.launch.sampling_params import SamplingParams


def make_requests(num_requests):
    options = RequestOptions(only_end=True)
    return [
        BulkRequest(build_request(f"prompt {index}", SamplingParams(), options), f"prompt {index}")
        for index in range(num_requests)
    ]


@pytest.fixture
def make_client(fake_server):
    clients = []

    def make(max_num_requests=100):
        clients.append(BulkClient(fake_server.address, max_num_requests))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_outputs_come_in_the_order_of_the_prompts(fake_server, make_client, deltas):
    first_may_end = threading.Event()

    def answer(request):
        if request.text == "prompt 0":
            first_may_end.wait(10)
        yield from deltas(request.text, size=100)

    fake_server.answer = answer
    done = []

    def on_done(output):
        done.append(output.prompt)
        if len(done) == 4:
            first_may_end.set()

    outputs = make_client().run(make_requests(5), on_done)
    assert [output.outputs[0].text for output in outputs] == [f"prompt {index}" for index in range(5)]
    assert [output.prompt for output in outputs] == [f"prompt {index}" for index in range(5)]
    assert done[-1] == "prompt 0"


def test_no_more_than_the_bound_are_on_their_way(fake_server, make_client, deltas):
    lock = threading.Lock()
    running, most = [], []

    def answer(request):
        with lock:
            running.append(request.text)
            most.append(len(running))
        yield from deltas("x")
        with lock:
            running.remove(request.text)

    fake_server.answer = answer
    outputs = make_client(max_num_requests=2).run(make_requests(20), lambda output: None)
    assert len(outputs) == 20
    # An output is read before its server function has quite returned, so one more may have begun.
    assert max(most) <= 3


def test_a_refused_prompt_is_named(fake_server, make_client, deltas):
    def answer(request):
        if request.text == "prompt 3":
            raise InvalidArgumentError("too long", "text")
        yield from deltas("x")

    fake_server.answer = answer
    with pytest.raises(InvalidArgumentError, match=r"prompts\[3\]: too long") as refusal:
        make_client().run(make_requests(5), lambda output: None)
    assert refusal.value.field == "text"


def test_a_client_goes_on_after_a_failure(fake_server, make_client, deltas):
    def answer(request):
        raise UnavailableError("not yet")

    fake_server.answer = answer
    client = make_client()
    with pytest.raises(UnavailableError, match="not yet"):
        client.run(make_requests(3), lambda output: None)
    fake_server.answer = lambda request: deltas("x")
    assert len(client.run(make_requests(3), lambda output: None)) == 3


def test_several_outputs_a_request(fake_server, make_client, samples):
    fake_server.answer = lambda request: samples(request.text, "b", "c")
    done = []
    outputs = make_client().run(make_requests(3), done.append)
    assert [[sample.text for sample in output.outputs] for output in outputs] == [
        [f"prompt {index}", "b", "c"] for index in range(3)
    ]
    assert sorted(output.prompt for output in done) == [f"prompt {index}" for index in range(3)]


def test_detokenize(make_client):
    assert make_client().detokenize([[97, 98], [99]]) == ["ab", "c"]
