"""Frames on the socket between the API process and the engine process: a length, then one MessagePack message.

It knows how messages travel, not what they mean.
"""

import asyncio
import socket
import struct

import msgspec

from onebase_server.engine.request import FromEngine, ToEngine
from onebase_server.settings import EngineSettings

HEADER = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the wire."""
    return frame(_encoder.encode(message))


def frame(body: bytes) -> bytes:
    """Put the length before a body."""
    return HEADER.pack(len(body)) + body


async def read_message(reader: asyncio.StreamReader) -> FromEngine:
    """The engine's next message; raises asyncio.IncompleteReadError when the engine is gone."""
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return _from_engine.decode(await reader.readexactly(length))


class EngineSocket:
    """The engine's end: blocking, for one reading and one writing thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb")

    def receive_settings(self) -> EngineSettings:
        """The first frame of all: what this engine is to load."""
        return EngineSettings.model_validate_json(self._receive())

    def receive(self) -> ToEngine:
        """The API's next message; raises EOFError when the API process is gone."""
        return _to_engine.decode(self._receive())

    def send(self, message: FromEngine) -> None:
        """Send a message; raises OSError when the API process is gone."""
        self._socket.sendall(encode_frame(message))

    def _receive(self) -> bytes:
        (length,) = HEADER.unpack(self._read_exactly(HEADER.size))
        return self._read_exactly(length)

    def _read_exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("the API process closed the connection")
        return data
