"""Several async generators as one, in the order in which their items come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def interleave(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Pairs of a stream's index and its item. The first error ends all; closing early closes every stream.

    One item of each stream waits at most, so a slow reader slows the streams.
    """
    if len(streams) == 1:  # needs no task between it and its reader
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    async with aclosing(_interleave_several(streams)) as pairs:
        async for pair in pairs:
            yield pair


async def _interleave_several(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((index, item))
            await items.put(None)
        except Exception as error:
            await items.put(error)

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
