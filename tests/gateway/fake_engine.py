"""An engine that says what a test tells it to: the coordinator's service as a gateway sees it."""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import tokenizers
from octavo.proto import admin_pb2, engine_pb2, engine_pb2_grpc, generation_pb2, sampling_pb2

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
EOS = 1
LETTER_A = 37  # the id of "A"; the other capitals follow


@dataclass
class Answer:
    """What the engine says to a request: its tokens a few at a time, then how it ends."""

    token_ids: list[int]
    finish_reason: int = STOP
    tokens_per_message: int = 1
    hold_after: int | None = None  # tokens; what follows waits for `FakeEngine.hold` to be set
    failure: engine_pb2.Failure | None = None
    num_first_prompt_logprobs: int | None = None  # what follows of them waits for `FakeEngine.hold`
    logprobs_of: list[float] = field(default_factory=lambda: [-0.5, -1.5, -2.5, -3.5])  # by rank
    samples: list[list[int]] = field(default_factory=list)  # tokens of each, where they differ
    sample_logprobs: list[float] = field(default_factory=list)  # of each token of each, where they differ
    beam_scores: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    def of_sample(self, index):
        """What one sample hears."""
        one = replace(self, token_ids=self.samples[index] if self.samples else self.token_ids)
        if self.sample_logprobs:
            one.logprobs_of = [0, self.sample_logprobs[index], -8, -9]
        return one


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """The coordinator's service. Runs on the gateway's event loop; tests tell it beforehand what to answer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sessions: list[asyncio.Queue[engine_pb2.SessionResponse | None]] = []
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.reset()

    def reset(self) -> None:
        self.hold = asyncio.Event()
        self.submits: list[engine_pb2.Submit] = []
        self.cancels: list[int] = []
        self.stops: list[int] = []
        self.status = admin_pb2.GetStatusResponse(version="0", model="tiny", num_gateways=1)
        self.answer = Answer([EOS])

    def say(self, text: str, **options) -> list[int]:
        """The next answers are this text, then the end-of-sequence token (or no more room: LENGTH)."""
        token_ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if options.get("finish_reason", STOP) == STOP:
            token_ids = [*token_ids, EOS]
        self.answer = Answer(token_ids, **options)
        return token_ids

    def say_samples(self, *texts: str, **options) -> list[list[int]]:
        """The next answers' samples are these texts; see `say`."""
        samples = [self.say(text, **options) for text in texts]
        self.answer = Answer([], samples=samples, **options)
        return samples

    def fail(self, code: int, message: str, **fields) -> None:
        failure = engine_pb2.Failure(code=code, message=message, **fields)
        self.answer = Answer([], failure=failure)

    def break_sessions(self) -> None:
        for news in self._sessions:
            news.put_nowait(None)

    def send(self, response: engine_pb2.SessionResponse) -> None:
        """News of a test's own."""
        for news in self._sessions:
            news.put_nowait(response)

    async def Session(self, requests, context):
        await self.accepts.wait()
        news = asyncio.Queue()
        self._sessions.append(news)
        answers = {}
        reader = asyncio.create_task(self._read(requests, news, answers))
        try:
            yield engine_pb2.SessionResponse()
            while (response := await news.get()) is not None:
                yield response
        finally:
            for task in (reader, *answers.values()):
                task.cancel()
            self._sessions.remove(news)

    async def GetStatus(self, request, context):
        return self.status

    async def _read(self, requests, news, answers):
        async for request in requests:
            for submit in request.submits:
                self.submits.append(submit)
                for handle, answer in self._answers(submit, news, self.answer, self.hold):
                    assert handle not in answers or answers[handle].done(), "a handle is used twice"
                    answers[handle] = asyncio.create_task(answer)
            for handle in np.frombuffer(request.cancel_handles, "<u4").tolist():
                self.cancels.append(handle)
                if handle in answers:  # a beam search speaks by its first
                    answers[handle].cancel()
            for handle in np.frombuffer(request.stop_handles, "<u4").tolist():
                self.stops.append(handle)
                answers[handle].cancel()

    def _answers(self, submit, news, answer, hold):
        """For each handle of the request, what speaks to it."""
        assert submit.num_samples >= 1
        handles = range(submit.handle, submit.handle + submit.num_samples)
        if answer.failure is not None:
            return [(submit.handle, self._fail(submit, news, answer))]
        if submit.HasField("beam_search"):
            return [(submit.handle, self._answer_beams(submit, news, answer, hold))]
        return [
            (handle, self._answer(submit, handle, news, answer.of_sample(index), hold))
            for index, handle in enumerate(handles)
            if not submit.resumed or any(output.index == index for output in submit.resumed)
        ]

    async def _fail(self, submit, news, answer):
        failure = engine_pb2.Failure()
        failure.CopyFrom(answer.failure)
        failure.handle = submit.handle
        news.put_nowait(engine_pb2.SessionResponse(failures=[failure]))

    async def _answer_beams(self, submit, news, answer, hold):
        """All of them in one message, with their scores."""
        if answer.hold_after is not None:
            await hold.wait()
        response = engine_pb2.SessionResponse()
        for index in range(submit.num_samples):
            one = answer.of_sample(index)
            ended = _response(submit, submit.handle + index, one.token_ids, answer.finish_reason, one)
            response = _joined(response, ended)
        response.beam_scores = np.array(answer.beam_scores[: submit.num_samples], "<f4").tobytes()
        news.put_nowait(_with_cached(response, submit, answer))

    async def _score_prompt(self, submit, resumed, news, answer, hold):
        start, end = 1 + (resumed.num_prompt_logprobs if resumed else 0), len(submit.prompt_token_ids) // 4
        if start == 1 and answer.num_first_prompt_logprobs is not None:
            start += answer.num_first_prompt_logprobs
            chunk = _prompt_chunk(submit, 1, start - 1, answer)
            news.put_nowait(engine_pb2.SessionResponse(prompt_logprobs=[chunk]))
            await hold.wait()
        if start < end:
            chunk = _prompt_chunk(submit, start, end - start, answer)
            news.put_nowait(engine_pb2.SessionResponse(prompt_logprobs=[chunk]))

    async def _answer(self, submit, handle, news, answer, hold):
        is_first = handle == submit.handle
        resumed = {output.index: output for output in submit.resumed}.get(handle - submit.handle)
        if submit.sampling_params.HasField("num_prompt_logprobs") and is_first:
            await self._score_prompt(submit, resumed, news, answer, hold)
        token_ids = answer.token_ids[: submit.sampling_params.max_tokens]
        finish_reason = answer.finish_reason if token_ids == answer.token_ids else LENGTH
        received = np.frombuffer(resumed.token_ids, "<i4").tolist() if resumed else []
        assert received == token_ids[: len(received)]
        for start in range(len(received), len(token_ids), answer.tokens_per_message):
            if answer.hold_after is not None and start >= answer.hold_after:
                await hold.wait()
            piece = token_ids[start : start + answer.tokens_per_message]
            ends = start + len(piece) == len(token_ids)
            response = _response(submit, handle, piece, finish_reason if ends else 0, answer)
            if start == 0 and is_first:
                response = _with_cached(response, submit, answer)
            news.put_nowait(response)
            await asyncio.sleep(0)


def _prompt_chunk(submit, start, num_rows, answer):
    prompt = np.frombuffer(submit.prompt_token_ids, "<i4").tolist()[start : start + num_rows]
    table = logprob_table(prompt, submit.sampling_params.num_prompt_logprobs, answer.logprobs_of)
    return engine_pb2.PromptLogprobs(handle=submit.handle, start=start, table=table)


def _response(submit, handle, token_ids, finish_reason, answer):
    response = engine_pb2.SessionResponse(
        handles=np.array([handle], "<u4").tobytes(),
        num_tokens=np.array([len(token_ids)], "<u4").tobytes(),
        finish_reasons=bytes([finish_reason]),
        token_ids=np.array(token_ids, "<i4").tobytes(),
    )
    if submit.sampling_params.HasField("num_logprobs"):
        table = logprob_table(token_ids, submit.sampling_params.num_logprobs, answer.logprobs_of)
        response.logprobs.add(entry=0, table=table)
    return response


def _joined(first, second):
    """The packed arrays of both, one after another."""
    joined = engine_pb2.SessionResponse()
    for name in ("handles", "num_tokens", "finish_reasons", "token_ids", "beam_scores"):
        setattr(joined, name, getattr(first, name) + getattr(second, name))
    return joined


def _with_cached(response, submit, answer):
    if answer.num_cached_tokens:
        response.cached_handles = np.array([submit.handle], "<u4").tobytes()
        response.num_cached_tokens = np.array([answer.num_cached_tokens], "<u4").tobytes()
    return response


def logprob_table(token_ids, num_top, logprobs):
    """Each token is the second likeliest; the likeliest ones are the letters from "A" on."""
    tops = list(range(LETTER_A, LETTER_A + num_top))
    rows = [[token_id, *tops] for token_id in token_ids]
    values = [[logprobs[1], *logprobs[:num_top]] for _ in token_ids]
    return sampling_pb2.LogprobTable(
        num_columns=1 + num_top,
        token_ids=np.array(rows, "<i4").tobytes(),
        logprobs=np.array(values, "<f4").tobytes(),
        ranks=np.full(len(token_ids), 2, "<i4").tobytes(),
    )
