import asyncio
import os
import subprocess
import sys

import pytest

from onebase_server.bench.memory import MemoryWatch
from onebase_server.errors import ConfigurationError

HOLD = "import sys; held = bytearray(b'x' * (64 << 20)); print('ready', flush=True); sys.stdin.read()"

NOWHERE = "http://127.0.0.1:9"


def test_the_peak_holds_all_descendants() -> None:
    watch = MemoryWatch(os.getpid(), NOWHERE)

    async def look() -> None:
        async with watch.watching():
            await asyncio.sleep(0.1)

    command = (sys.executable, "-c", HOLD)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        asyncio.run(look())
        child.communicate()
    (found,) = [process for process in watch.peak.processes if process.pid == child.pid]
    assert found.rss > 64 << 20
    assert found.pss is None or found.pss > 64 << 20
    assert watch.peak.rss > found.rss
    assert watch.peak.parts == {}


def test_a_process_that_is_not_there_is_refused() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ConfigurationError, match=f"no process {ended.pid}"):
        MemoryWatch(ended.pid, NOWHERE)
