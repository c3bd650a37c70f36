"""The engine process: loads the base, then steps for as long as there is work.

Started by `client.EngineClient` as `python -m onebase_server.engine.process FD`, with FD one end of a socket pair. A
thread reads messages; the main thread computes. When the API process goes away, so does this one.
"""

import logging
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

import onebase_kernels as kernels
from onebase_server.engine.core import Engine
from onebase_server.engine.protocol import EngineSocket
from onebase_server.engine.request import Failed, Ready, ToEngine
from onebase_server.engine.scheduler import MAX_HELD_SECONDS
from onebase_server.errors import OnebaseError
from onebase_server.model.backend import use_kernels
from onebase_server.model.weights import load_decoder, resolve_device
from onebase_server.process_memory import return_free_memory
from onebase_server.progress import step_progress
from onebase_server.settings import EngineSettings

logger = logging.getLogger(__name__)

GIL_SECONDS = 0.0002
"""How long the thread that reads adapters may keep the step loop waiting for the interpreter, between two bytecodes."""


class Inbox:
    """Messages for the step loop, and a bell that wakes it without one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()

    def put(self, message: ToEngine) -> None:
        """Leave a message."""
        self._queue.put(message)

    def ring(self) -> None:
        """Wake the loop: an adapter's blob has been read."""
        self._queue.put(None)

    def take(self, timeout: float | None) -> list[ToEngine]:
        """All messages there are; if none, wait `timeout` seconds (None: for ever) for one, or for the bell."""
        taken = []
        try:
            taken.append(self._queue.get(timeout=timeout))
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return [message for message in taken if message is not None]


def load_engine(settings: EngineSettings, inbox: Inbox) -> tuple[Engine, Ready]:
    """Load the base and lay out memory; raises OnebaseError when the base or a setting is wrong."""
    device = resolve_device(settings.device)
    logger.info("computing on %s with the kernels %s", device.type, use_kernels(settings.kernels, device))
    kernels.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    with step_progress(f"Quantising the base to {settings.quantization}") as on_progress:
        decoder = load_decoder(Path(settings.base), settings, on_progress)
    return_free_memory()
    engine = Engine(decoder, settings, on_loaded=inbox.ring)
    engine.warm_up()
    ready = Ready(
        vocab_size=decoder.config.vocab_size,
        max_model_len=engine.max_model_len,
        adapter_bytes_total=engine.adapter_pool.bytes_total,
        adapter_element_bytes=1 if settings.adapter_quantization == "int8" else decoder.dtype.itemsize,
        quantization=decoder.config.quantization or settings.quantization,
        weights=decoder.weights.report(),
        stats=engine.stats(),
    )
    return engine, ready


def run(engine: Engine, inbox: Inbox, connection: EngineSocket) -> None:
    """Step for ever; sleep only when nothing can be computed, and no longer than the scheduler holds prompts back."""
    is_idle = True
    while True:
        held = MAX_HELD_SECONDS if engine.has_work else None
        for message in inbox.take(held if is_idle else 0):
            engine.handle(message)
        for answer in engine.poll_attaches():
            connection.send(answer)
        outputs = engine.step()
        connection.send(outputs)
        is_idle = outputs.stats.batch_tokens == 0


def read_messages(connection: EngineSocket, inbox: Inbox) -> None:
    """Feed the inbox until the API process is gone, then end this process at once."""
    try:
        while True:
            inbox.put(connection.receive())
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """Entry point of the process."""
    for name in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the API process decides
        signal.signal(name, signal.SIG_IGN)
    sys.setswitchinterval(GIL_SECONDS)
    connection = EngineSocket(socket.socket(fileno=int(sys.argv[1])))
    settings = connection.receive_settings()
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s engine: %(message)s")
    inbox = Inbox()
    threading.Thread(target=read_messages, args=(connection, inbox), daemon=True).start()
    try:
        engine, ready = load_engine(settings, inbox)
    except OnebaseError as error:
        connection.send(Failed(error=error.message))
        sys.exit(1)
    connection.send(ready)
    try:
        run(engine, inbox, connection)
    except OSError:
        logger.info("the API process is gone")


if __name__ == "__main__":
    main()
