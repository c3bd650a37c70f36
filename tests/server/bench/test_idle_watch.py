import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from onebase_server.bench.idle_watch import IdleWatch
from onebase_server.errors import ConfigurationError

SPIN = "print('ready', flush=True)\nwhile True: pass"


@pytest.fixture
def busy_pid() -> Iterator[int]:
    """A process that uses a core."""
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_server_that_is_busy_while_another_is_measured_is_told(busy_pid: int) -> None:
    watch = IdleWatch({"busy": busy_pid})
    with watch.while_measuring("another"):
        time.sleep(0.3)
    (note,) = watch.notes()
    assert note.startswith("busy used up to ")


def test_the_measured_server_may_be_busy(busy_pid: int) -> None:
    watch = IdleWatch({"busy": busy_pid})
    with watch.while_measuring("busy"):
        time.sleep(0.3)
    assert list(watch.notes()) == []


def test_a_process_that_is_not_there_is_refused() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ConfigurationError, match=f"no process {ended.pid}"):
        IdleWatch({"ended": ended.pid})
