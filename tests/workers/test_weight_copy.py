"""Weights from a rank of another group: bit by bit those of the disk, and the disk's whatever happens on the way."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
import torch.distributed as dist
from octavo.proto import sampling_pb2, worker_pb2
from octavo.workers import copies, loading, peer_group
from octavo.workers.model_loader import load_model, make_model
from octavo.workers.parallel import TensorParallel
from octavo.workers.peer_group import PeerGroup
from octavo.workers.rendezvous import bind_collectives_to
from octavo.workers.weight_copy import layout_of, receive_weights, send_weights
from safetensors.torch import load_file, save_file

from .rank_process import LocalRank, RankProcess, pack

CPU = torch.device("cpu")
PROMPT = [5, 9, 100, 3, 77, 42, 8, 19, 64, 2, 31]
SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {"vocab_size": 101, "hidden_size": 48, "num_attention_heads": 4, "head_dim": 12, "num_key_value_heads": 1},
}


def meet(source, receiver, devices=(CPU, CPU)):
    """source(group) and receiver(group) beside each other; what the latter returns."""
    bind_collectives_to("127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arrived = threading.Barrier(2)

    def run(is_source, function):
        device = devices[0 if is_source else 1]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        own = store if is_source else dist.TCPStore("127.0.0.1", store.port, is_master=False)
        group = PeerGroup(own, is_source, device, patience_s=30)
        try:
            return function(group)
        finally:
            arrived.wait(60)  # what is on its way would be lost with the sender's group
            group.close()

    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(run, True, source)
        received = pool.submit(run, False, receiver).result()
        sending.result()
    return received


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_every_tensor_arrives_bit_by_bit(load_format, shape, dtype, size, make_llama, monkeypatch):
    monkeypatch.setattr(peer_group, "_PIECE_BYTES", 10_000)  # a tensor comes in several
    path = make_llama(**SHAPES[shape])
    for rank in range(size):
        tp = TensorParallel(rank, size, CPU)
        source, _ = load_model(path, load_format, dtype, tp, 64, seed=3)
        copy = make_model(path, load_format, dtype, tp, 64)
        assert layout_of(copy) == layout_of(source)
        num_bytes = meet(
            lambda group, source=source: send_weights(source, group, CPU),
            lambda group, copy=copy: receive_weights(copy, group, CPU),
        )
        expected, found = list(source.parameters()), list(copy.parameters())
        assert num_bytes == sum(parameter.dense().nbytes for parameter in expected)
        for theirs, ours in zip(expected, found, strict=True):
            assert torch.equal(theirs.dense(), ours.dense())
            assert ours.dense().is_contiguous()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_every_tensor_arrives_bit_by_bit_on_another_gpu(size, dtype, make_llama, monkeypatch):
    monkeypatch.setattr(peer_group, "_PIECE_BYTES", 10_000)
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    shards = [TensorParallel(size - 1, size, device) for device in devices]
    source, _ = load_model(make_llama(), "safetensors", dtype, shards[0], 64, seed=3)
    copy = make_model(make_llama(), "safetensors", dtype, shards[1], 64)
    meet(
        lambda group: send_weights(source, group, devices[0]),
        lambda group: receive_weights(copy, group, devices[1]),
        devices,
    )
    for theirs, ours in zip(source.parameters(), copy.parameters(), strict=True):
        assert torch.equal(theirs.dense().cpu(), ours.dense().cpu())


def test_all_that_a_checkpoint_gives_is_among_the_parameters(make_llama):
    """Of a model that was loaded, what is left when they are zeroed is what no checkpoint gives: the rope tables."""
    model, config = load_model(make_llama(), "safetensors", torch.float32, TensorParallel(0, 1, CPU), 64, seed=0)
    num_elements = sum(parameter.dense().numel() for parameter in model.parameters())
    shapes = model.tensor_shapes(config).values()
    assert num_elements == sum(torch.Size(shape).numel() for shape in shapes)


def test_another_shape_has_another_layout(make_llama):
    tp = TensorParallel(0, 1, CPU)
    layouts = {
        layout_of(make_model(make_llama(**overrides), "dummy", dtype, tp, 64))
        for overrides in SHAPES.values()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(layouts) == 2 * len(SHAPES)


@pytest.fixture
def ranks():
    """ranks(LocalRank or RankProcess, ...) -> a new one."""
    started = []

    def start(kind=LocalRank, *arguments, **keywords):
        started.append(kind(*arguments, **keywords))
        return started[-1]

    yield start
    for rank in started:
        rank.close()


@pytest.fixture
def checkpoint(make_llama, tmp_path):
    """A model of the test's own."""
    for file in make_llama(eos_token_id=None).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def generate(rank, epoch, num_tokens=8) -> list[int]:
    steps = rank.steps(epoch)
    found = steps.begin(PROMPT, range(8)) + steps.decode(num_tokens - 1)
    steps.end()
    return found


def spoil(path) -> None:
    """Other weights on the disk: who reads them generates other tokens."""
    tensors = load_file(path / "model.safetensors")
    save_file({name: -tensor.flip(0).contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def test_a_rank_takes_the_weights_of_another_and_leaves_the_disk_alone(ranks, checkpoint):
    source, receiver, third = ranks(), ranks(), ranks()
    loaded = source.configure(checkpoint, epoch=1)
    assert (loaded.copied_weights, loaded.copy_failure) == (False, "")
    expected = generate(source, 1)
    spoil(checkpoint)
    copied = receiver.configure(checkpoint, epoch=2, source=source.address, max_model_len=128)
    assert (copied.copied_weights, copied.kept_weights, copied.copy_failure) == (True, False, "")
    assert generate(receiver, 2) == expected
    # What was copied is kept, and handed on, by a source that is in another epoch since.
    assert receiver.configure(checkpoint, epoch=3, source=source.address, max_model_len=128).kept_weights
    assert third.configure(checkpoint, epoch=4, source=receiver.address).copied_weights
    assert generate(third, 4) == expected


def test_a_source_that_does_not_hold_the_same_refuses(ranks, checkpoint):
    source = ranks()
    empty = ranks()
    source.configure(checkpoint, epoch=1)
    expected = generate(source, 1)
    for epoch, address in enumerate((source.address, empty.address, "127.0.0.1:1"), start=2):
        receiver = ranks()
        fields = {"dtype": "bfloat16"} if address == source.address else {}
        stage = receiver.configure(checkpoint, epoch=epoch, source=address, **fields)
        assert not stage.copied_weights
        assert address in stage.copy_failure
        if not fields:
            assert generate(receiver, epoch) == expected
        assert ("does not hold" in stage.copy_failure) == (address != "127.0.0.1:1")


def slow_down(monkeypatch, num_seconds) -> threading.Event:
    """Has each tensor take longer to be sent; says when the first was."""
    begun = threading.Event()
    send = PeerGroup.send

    def send_slowly(self, tensors):
        send(self, tensors)
        begun.set()
        time.sleep(num_seconds)

    monkeypatch.setattr(PeerGroup, "send", send_slowly)
    return begun


def test_the_source_generates_on_while_it_sends(ranks, checkpoint, monkeypatch):
    source, receiver = ranks(), ranks()
    source.configure(checkpoint, epoch=1)
    steps = source.steps(1)
    undisturbed = steps.begin(PROMPT, range(8)) + steps.decode(40)
    begun = slow_down(monkeypatch, 0.05)
    with ThreadPoolExecutor(1) as pool:
        configuring = pool.submit(receiver.configure, checkpoint, 2, source.address)
        assert begun.wait(60)
        steps.step(leave_slots=b"\0\0", decode_slots_changed=True)
        found = steps.begin(PROMPT, range(8)) + steps.decode(40)
        assert not configuring.done(), "the copy was over before the tokens were there"
        assert configuring.result().copied_weights
    steps.end()
    assert found == undisturbed
    assert generate(receiver, 2) == undisturbed[:8]


def test_two_receivers_at_once(ranks, checkpoint, monkeypatch):
    slow_down(monkeypatch, 0.01)
    source, *receivers = ranks(), ranks(), ranks()
    source.configure(checkpoint, epoch=1)
    with ThreadPoolExecutor(2) as pool:
        stages = list(pool.map(lambda r: r.configure(checkpoint, 2, source.address), receivers))
    assert all(stage.copied_weights for stage in stages)
    assert generate(receivers[0], 2) == generate(receivers[1], 2) == generate(source, 1)


def test_a_source_that_goes_on_to_another_epoch_breaks_the_copy_off(ranks, checkpoint, monkeypatch):
    source, receiver = ranks(), ranks()
    source.configure(checkpoint, epoch=1)
    expected = generate(source, 1)
    begun = slow_down(monkeypatch, 0.2)
    with ThreadPoolExecutor(1) as pool:
        configuring = pool.submit(receiver.configure, checkpoint, 2, source.address)
        assert begun.wait(60)
        assert source.configure(checkpoint, epoch=3).kept_weights
        stage = configuring.result()
    assert not stage.copied_weights
    assert stage.copy_failure
    assert generate(source, 3) == generate(receiver, 2) == expected


def test_a_copy_does_not_begin_in_an_epoch_that_is_over(ranks, checkpoint, monkeypatch):
    """Nobody would end it, and it would hold a model's memory beside the next epoch's."""
    source, receiver = ranks(), ranks()
    source.configure(checkpoint, epoch=1)
    is_made, go_on, begun, make_model = threading.Event(), threading.Event(), [], loading.make_model

    def make_slowly(*arguments):
        is_made.set()
        assert go_on.wait(60)
        return make_model(*arguments)

    monkeypatch.setattr(loading, "make_model", make_slowly)
    monkeypatch.setattr(copies.Copies, "fetch_weights", lambda *arguments: begun.append(arguments))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(receiver.configure, checkpoint, 2, source.address)
        assert is_made.wait(60)
        second = pool.submit(receiver.configure, checkpoint, 3)
        while receiver.stub.Ping(worker_pb2.PingRequest()).epoch < 3:
            time.sleep(0.01)
        go_on.set()
        with pytest.raises(grpc.RpcError, match="epoch 2 is over"):
            first.result(60)
        second.result(60)
    assert not begun


def _at_the_fifth_tensor(method, action) -> None:
    whole, count = getattr(PeerGroup, method), iter(range(1000))

    def stop_there(self, tensors):
        if next(count) == 5:
            action()
        whole(self, tensors)

    setattr(PeerGroup, method, stop_there)


def die_sending() -> None:
    _at_the_fifth_tensor("send", lambda: os._exit(1))


def hang_sending() -> None:
    _at_the_fifth_tensor("send", lambda: time.sleep(600))


def die_receiving() -> None:
    _at_the_fifth_tensor("receive", lambda: os._exit(1))


@pytest.mark.parametrize("prepare", [die_sending, hang_sending])
def test_a_source_that_is_lost_on_the_way_is_replaced_by_the_disk(prepare, ranks, checkpoint, monkeypatch):
    monkeypatch.setattr(copies, "WEIGHTS_PATIENCE_S", 2.0)
    source, receiver = ranks(RankProcess, prepare), ranks()
    source.configure(checkpoint, epoch=1)
    stage = receiver.configure(checkpoint, epoch=2, source=source.address)
    assert not stage.copied_weights
    assert "lost" in stage.copy_failure
    undisturbed = ranks()
    undisturbed.configure(checkpoint, epoch=1)
    assert generate(receiver, 2) == generate(undisturbed, 1)


def test_a_receiver_that_dies_leaves_the_source_as_it_was(ranks, checkpoint):
    source, lost, receiver = ranks(), ranks(RankProcess, die_receiving), ranks()
    source.configure(checkpoint, epoch=1)
    with pytest.raises(Exception, match="UNAVAILABLE"):
        lost.configure(checkpoint, epoch=2, source=source.address)
    assert receiver.configure(checkpoint, epoch=2, source=source.address).copied_weights
    assert generate(source, 1) == generate(receiver, 2)
    assert source.configure(checkpoint, epoch=3).kept_weights  # and nothing of the copy holds it up
    assert source.stub.Ping(worker_pb2.PingRequest()).epoch == 3


def test_each_rank_of_a_group_copies_its_own_shard(ranks, checkpoint):
    """Two groups of two ranks, as processes: gloo between them as within them."""
    groups = [[ranks(RankProcess, create_store=rank == 0) for rank in range(2)] for _ in range(2)]

    def configure(group, epoch, sources=("", "")):
        store_address = group[0].store_address
        with ThreadPoolExecutor(2) as pool:
            return list(
                pool.map(lambda r: group[r].configure(checkpoint, epoch, sources[r], r, 2, store_address), range(2))
            )

    def generate_together(group, epoch):
        with ThreadPoolExecutor(2) as pool:
            return next(iter(pool.map(lambda rank: generate_silently(rank, epoch), group)))

    configure(groups[0], 1)
    expected = generate_together(groups[0], 1)
    spoil(checkpoint)
    stages = configure(groups[1], 2, [rank.address for rank in groups[0]])
    assert [stage.copied_weights for stage in stages] == [True, True]
    assert generate_together(groups[1], 2) == expected
    alone = ranks()
    assert "does not hold" in alone.configure(checkpoint, 1, groups[0][0].address).copy_failure


def generate_silently(rank, epoch, num_tokens=8) -> list[int]:
    """As `generate`, of a rank that may be none to answer."""
    join = worker_pb2.SlotJoin(
        slot=0, token_ids=pack(PROMPT), num_prompt_tokens=len(PROMPT), block_ids=pack(range(8)),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=200),
    )  # fmt: skip
    slot = pack([0], "<u2")
    fields = [
        {"joins": [join], "chunk_slots": slot, "chunk_num_tokens": pack([len(PROMPT)])},
        *({"decode_slots_changed": True, "decode_slots": slot} for _ in range(num_tokens - 1)),
    ]
    plans = [worker_pb2.BatchPlan(epoch=epoch, step_id=i, **each) for i, each in enumerate(fields, start=1)]
    return [result.token_ids for result in rank.stub.Steps(iter(plans))]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_weights_go_from_gpu_to_gpu_beside_steps(enforce_eager, ranks, checkpoint):
    source, receiver = (ranks(RankProcess, device=f"cuda:{i}") for i in range(2))
    source.configure(checkpoint, epoch=1, enforce_eager=enforce_eager)
    steps = source.steps(1)
    undisturbed = steps.begin(PROMPT, range(32)) + steps.decode(200)
    spoil(checkpoint)
    with ThreadPoolExecutor(1) as pool:
        fields = {"source": source.address, "enforce_eager": enforce_eager}
        configuring = pool.submit(receiver.configure, checkpoint, 2, **fields)
        while not configuring.done():
            steps.step(leave_slots=b"\0\0", decode_slots_changed=True)
            assert steps.begin(PROMPT, range(32)) + steps.decode(200) == undisturbed
        assert configuring.result().copied_weights
    steps.end()
    assert generate(receiver, 2) == undisturbed[:8]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("prepare", [die_sending, hang_sending])
def test_a_gpu_that_is_lost_on_the_way_is_replaced_by_the_disk(prepare, ranks, checkpoint, monkeypatch):
    """The receiver's process lives on, which NCCL's own watchdog would end."""
    monkeypatch.setattr(copies, "WEIGHTS_PATIENCE_S", 2.0)
    source, receiver = ranks(RankProcess, prepare, "cuda:0"), ranks(LocalRank, "cuda:1")
    source.configure(checkpoint, epoch=1, enforce_eager=True)
    stage = receiver.configure(checkpoint, epoch=2, source=source.address, enforce_eager=True)
    assert not stage.copied_weights
    assert stage.copy_failure
    found = generate(receiver, 2)
    assert receiver.configure(checkpoint, epoch=3, enforce_eager=True).kept_weights
    assert generate(receiver, 3) == found
