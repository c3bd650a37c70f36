"""The API's side of the engine: starts it, speaks with it, and starts it again when it dies.

Lives in the API process's event loop. It knows nothing of HTTP, and no torch.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import uuid
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Tokens

from onebase_server.engine.protocol import encode_frame, frame, read_message
from onebase_server.engine.request import (
    Abort,
    AdapterRef,
    Attach,
    Attached,
    EngineStats,
    Failed,
    FromEngine,
    Ready,
    Retire,
    SamplingParams,
    StepOutputs,
    Submit,
    ToEngine,
    TokenOutput,
)
from onebase_server.errors import ConfigurationError, EngineUnavailable
from onebase_server.settings import EngineSettings

logger = logging.getLogger(__name__)

FIRST_RESTART_DELAY = 0.1
LONGEST_RESTART_DELAY = 30.0
"""Seconds between a death and the next start; doubled while the engine dies before it is ready."""


def engine_gone() -> EngineUnavailable:
    """What requests in flight get when the engine dies; an exception of its own for each."""
    return EngineUnavailable("The engine stopped while this was running and is being restarted. Please try again.")


class EngineClient:
    """One engine process, supervised.

    `on_stats` is called when it is ready and after every step, `on_restart` whenever a process has died that is going
    to be replaced.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        on_stats: Callable[[EngineStats], None] = lambda _: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._on_stats = on_stats
        self._on_restart = on_restart
        self._info: Ready | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[Ready] | None = None
        self._requests: dict[str, asyncio.Queue[TokenOutput | None]] = {}
        self._attaching: dict[str, list[asyncio.Future[Attached]]] = {}

    @property
    def info(self) -> Ready | None:
        """What the engine said of itself when it was ready; None while it is not."""
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._info is not None

    @property
    def _has_started(self) -> bool:
        """Whether the engine has been ready once, so that its settings cannot be what is wrong."""
        return self._first_start is not None and self._first_start.done()

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn the engine and supervise it; returns at once."""
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> Ready:
        """Wait for the first start; raises ConfigurationError when the engine cannot start with these settings."""
        assert self._first_start is not None, "start() comes first"
        return await asyncio.shield(self._first_start)

    async def stop(self) -> None:
        """End the engine; requests in flight fail."""
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._first_start and not self._first_start.done():
            self._first_start.cancel()

    async def generate(
        self,
        prompt_token_ids: Tokens[int],
        sampling: SamplingParams,
        adapter: AdapterRef | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Generate one sequence; ends after the output that has a finish reason.

        Closing the generator early aborts the request. Raises EngineUnavailable when the engine is not there, or dies
        on the way.
        """
        request_id = request_id or uuid.uuid4().hex
        outputs: asyncio.Queue[TokenOutput | None] = asyncio.Queue()
        self._send(
            Submit(request_id=request_id, prompt_token_ids=tuple(prompt_token_ids), sampling=sampling, adapter=adapter)
        )
        self._requests[request_id] = outputs
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                if output is None:
                    finished = True
                    raise engine_gone()
                finished = output.finish_reason is not None
                yield output
        finally:
            self._requests.pop(request_id, None)
            if not finished and self.is_ready:
                self._send(Abort(request_id=request_id))

    async def attach(self, adapter: AdapterRef) -> Attached:
        """Bring an adapter into device memory ahead of its first request; raises EngineUnavailable."""
        answer: asyncio.Future[Attached] = asyncio.get_running_loop().create_future()
        self._send(Attach(adapter=adapter))
        self._attaching.setdefault(adapter.digest, []).append(answer)
        return await answer

    def retire(self, digest: str) -> None:
        """An adapter version is no longer live: free its memory after its last request. No engine, no memory."""
        if self.is_ready:
            self._send(Retire(digest=digest))

    def _send(self, message: ToEngine) -> None:
        if self._writer is None or not self.is_ready:
            raise EngineUnavailable("The engine is starting; try again in a moment.")
        self._writer.write(encode_frame(message))

    # Supervision.

    async def _supervise(self) -> None:
        delay = FIRST_RESTART_DELAY
        try:
            while True:
                was_ready = await self._run_once()
                if not self._has_started:
                    raise ConfigurationError("The engine process ended before it was ready; its last words are above.")
                delay = FIRST_RESTART_DELAY if was_ready else min(2 * delay, LONGEST_RESTART_DELAY)
                logger.error("the engine process ended; starting it again in %.1f s", delay)
                self._on_restart()
                await asyncio.sleep(delay)
        except ConfigurationError as error:
            assert self._first_start is not None
            self._first_start.set_exception(error)
            self._first_start.exception()  # whoever waits gets it; nobody has to

    async def _run_once(self) -> bool:
        """One life of the engine process; returns whether it had been ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # else a folder called `kernels` in the working directory shadows a package of that name
                "-m",
                "onebase_server.engine.process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={"OMP_WAIT_POLICY": "passive"} | os.environ,  # torch's idle threads leave the cores to others
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            self._writer.write(frame(self._settings.model_dump_json().encode()))
            await self._read_messages(reader)
        finally:
            was_ready = self._bury()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        return was_ready

    async def _read_messages(self, reader: asyncio.StreamReader) -> None:
        """Hand the engine's messages on until its end of the socket closes."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self._receive(await read_message(reader))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    if queue := self._requests.get(output.request_id):
                        queue.put_nowait(output)
                self._on_stats(message.stats)
            case Attached():
                for answer in self._attaching.pop(message.digest, []):
                    if not answer.done():
                        answer.set_result(message)
            case Ready():
                self._info = message
                self._on_stats(message.stats)
                if self._first_start and not self._has_started:
                    self._first_start.set_result(message)
            case Failed():
                if not self._has_started:
                    raise ConfigurationError(message.error)
                logger.error("the engine cannot start: %s", message.error)

    def _bury(self) -> bool:
        """The engine is gone: end what waited for it; returns whether it had been ready."""
        was_ready, self._info = self.is_ready, None
        if self._writer:
            self._writer.close()
            self._writer = None
        for queue in self._requests.values():
            queue.put_nowait(None)
        for answers in self._attaching.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(engine_gone())
        self._attaching.clear()
        return was_ready
