import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from onebase_server.api.merging import merge


class Source:
    """Streams numbers, and remembers whether it was closed."""

    def __init__(self, *items: int, error: Exception | None = None, stall: bool = False) -> None:
        self.items, self.error, self.stall = items, error, stall
        self.is_closed = False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.error:
                raise self.error
            if self.stall:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def test_every_item_of_every_stream_comes_once():
    merged = merge([Source(1, 2, 3).stream(), Source(4, 5).stream(), Source().stream()])
    assert sorted([item async for item in merged]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_the_merged_stream_closes_all(count):
    sources = [Source(index, stall=True) for index in range(count)]
    async with aclosing(merge([source.stream() for source in sources])) as merged:
        for _ in range(count):
            await anext(merged)
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("others", [0, 2])
async def test_a_failure_of_one_ends_all(others):
    sources = [Source(error=ValueError("broken")), *(Source(stall=True) for _ in range(others))]
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([source.stream() for source in sources]):
            pass
    assert all(source.is_closed for source in sources)
