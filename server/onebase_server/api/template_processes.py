"""Renders chat templates that came with adapters in other processes, so that one that runs wild harms nobody else.

Processes start when they are needed and stay for the next conversation, whosever it is. What a template may take is
`model.template_process`'s business.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from onebase_server.errors import BadRequest
from onebase_server.model.template_process import MAX_PROMPT_CHARACTERS, MEMORY_BYTES, RENDER_SECONDS

MAX_PROCESSES = 4
"""Each takes some 20 MB."""
_LONGEST_LINE = 12 * MAX_PROMPT_CHARACTERS + 4096
"""Bytes of an answer: JSON writes a character beyond the basic plane as two escapes of six."""


class TemplateProcesses:
    """A few processes, which templates take in turn; one template has one of them at a time and leaves the others."""

    def __init__(self) -> None:
        self._processes: list[_TemplateProcess] = []
        self._idle: list[_TemplateProcess] = []
        self._some_idle = asyncio.Semaphore(MAX_PROCESSES)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def render(self, source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt that the template `source` makes of `messages`; `variables` are its own besides.

        Raises:
            BadRequest: The template refuses the messages, or takes too much time or memory for them.
        """
        turn = self._turns.setdefault(source, asyncio.Lock())
        async with turn, self._some_idle:
            process = self._idle.pop() if self._idle else self._add_process()
            try:
                return await process.render({"source": source, "messages": messages, "variables": variables})
            finally:
                self._idle.append(process)

    async def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            await process.stop()

    def _add_process(self) -> "_TemplateProcess":
        self._processes.append(_TemplateProcess())
        return self._processes[-1]


class _TemplateProcess:
    """A process, which is started when it is needed and killed when it goes wrong."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, conversation: Mapping[str, Any]) -> str:
        """Ask the process; raises BadRequest."""
        try:
            answer = await self._ask(json.dumps(conversation).encode() + b"\n")
        except BaseException:  # cancelled: an answer that nobody has read would be taken for the next one's
            await self.stop()
            raise
        if answer is None:
            await self._bury()
            raise BadRequest(
                f"The model's chat template took more than {RENDER_SECONDS:.0f} s or {MEMORY_BYTES >> 20} MiB for "
                "these messages. It came with the adapter, whose publisher can upload another.",
                param="messages",
            )
        if "error" in answer:
            raise BadRequest(answer["error"], param="messages")
        return answer["prompt"]

    async def _ask(self, line: bytes) -> dict[str, str] | None:
        """The answer; None if the process ended instead."""
        process = self._process = self._process or await _start()
        assert process.stdin is not None, "it was started with pipes"
        assert process.stdout is not None, "it was started with pipes"
        try:
            process.stdin.write(line)
            await process.stdin.drain()
            answer = await process.stdout.readline()
        except ConnectionError:
            return None
        decoded: dict[str, str] | None = json.loads(answer) if answer else None
        return decoded

    async def stop(self) -> None:
        """End the process, if there is one; the next conversation starts another."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                self._process.kill()
            await self._bury()

    async def _bury(self) -> None:
        """Wait for the end of a process that is ending."""
        process, self._process = self._process, None
        if process is not None:
            await process.wait()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "onebase_server.model.template_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},  # no keys
        limit=_LONGEST_LINE,
    )
