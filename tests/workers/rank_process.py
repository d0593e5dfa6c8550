"""Workers that a test drives by their gRPC address: in this process, or in one of their own, which may die."""

import multiprocessing
import threading

import grpc
import numpy as np
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2, worker_pb2_grpc
from octavo.workers.server import WorkerServer

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["octavo.tests.warm_rank"])


def pack(values, dtype="<i4") -> bytes:
    return np.asarray(list(values), dtype=dtype).tobytes()


def unpack(data) -> list[int]:
    return np.frombuffer(data, "<i4").tolist()


class DrivenRank:
    """A client of one rank, which is alone in its group unless it is told otherwise."""

    def __init__(self, address: str, store_address: str = "") -> None:
        self.address, self.store_address = address, store_address
        self.channel = grpc.insecure_channel(address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def configure(self, path, epoch, source="", rank=0, size=1, store_address="", **fields):
        """The progress of the stage in which weights come."""
        sizes = {"block_size": 8, "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
        options = {"load_format": "safetensors", "dtype": "float32", "gpu_memory_utilization": 0.9}
        defaults = options | sizes | {"num_blocks_override": 64, "store_address": store_address}
        request = worker_pb2.ConfigureRequest(
            config=engine_pb2.WorkerConfig(model_path=str(path), **(defaults | fields)),
            rank=rank, tensor_parallel_size=size, epoch=epoch, weight_source=source,
        )  # fmt: skip
        return next(stage for stage in list(self.stub.Configure(request)) if stage.stage == "weights")

    def steps(self, epoch) -> "Steps":
        return Steps(self.stub, epoch)

    def receive_blocks(self, source: "DrivenRank", pairs, epoch, source_epoch, **fields):
        """pairs: (block there, block here)."""
        request = worker_pb2.ReceiveBlocksRequest(
            epoch=epoch,
            source_address=source.address,
            source_epoch=source_epoch,
            source_block_ids=pack(there for there, _ in pairs),
            block_ids=pack(here for _, here in pairs),
            **fields,
        )
        return self.stub.ReceiveBlocks(request)

    def close(self) -> None:
        self.channel.close()


class Steps:
    """The stream of plans to a rank; each is answered before the next."""

    def __init__(self, stub, epoch) -> None:
        self._epoch, self._step_id = epoch, 0
        self._plans, self._ready = [], threading.Semaphore(0)
        self._answers = stub.Steps(self._send())

    def _send(self):
        while True:
            self._ready.acquire()
            if (plan := self._plans.pop(0)) is None:
                return
            yield plan

    def step(self, **fields) -> list[int]:
        """What it samples, if it is a rank that answers."""
        self._step_id += 1
        self._plans.append(worker_pb2.BatchPlan(epoch=self._epoch, step_id=self._step_id, **fields))
        self._ready.release()
        return unpack(next(self._answers).token_ids)

    def begin(self, token_ids, blocks, slot=0, num_computed=0) -> list[int]:
        """A sequence joins and computes all its tokens but those that are in its blocks."""
        join = worker_pb2.SlotJoin(
            slot=slot, token_ids=pack(token_ids), num_prompt_tokens=len(token_ids), num_computed_tokens=num_computed,
            block_ids=pack(blocks),
            sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=200),
        )  # fmt: skip
        count = len(token_ids) - num_computed
        return self.step(joins=[join], chunk_slots=pack([slot], "<u2"), chunk_num_tokens=pack([count]))

    def decode(self, num_tokens, slots=(0,)) -> list[int]:
        """Of the slots in turn."""
        found = self.step(decode_slots_changed=True, decode_slots=pack(slots, "<u2"))
        for _ in range(num_tokens - 1):
            found += self.step()
        return found

    def end(self) -> None:
        self._plans.append(None)
        self._ready.release()
        assert list(self._answers) == []


class LocalRank(DrivenRank):
    """In this process."""

    def __init__(self, device="cpu") -> None:
        self._server = WorkerServer("127.0.0.1", device, create_store=False, num_threads=1)
        super().__init__(self._server.start().address)

    def close(self) -> None:
        super().close()
        self._server.stop()


def _serve(pipe, device, create_store, prepare) -> None:
    if prepare is not None:
        prepare()
    server = WorkerServer("127.0.0.1", device, create_store=create_store, num_threads=1)
    endpoints = server.start()
    pipe.send((endpoints.address, endpoints.store_address))
    pipe.recv()
    server.stop()


class RankProcess(DrivenRank):
    """In a process of its own, which calls `prepare` first."""

    def __init__(self, prepare=None, device="cpu", create_store=False) -> None:
        self._pipe, theirs = _FORKSERVER.Pipe()
        self.process = _FORKSERVER.Process(target=_serve, args=(theirs, device, create_store, prepare), daemon=True)
        self.process.start()
        assert self._pipe.poll(120), "the rank did not start"
        super().__init__(*self._pipe.recv())

    def close(self) -> None:
        super().close()
        self.process.kill()
        self.process.join()
