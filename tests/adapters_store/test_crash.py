"""A process killed at any point of a publish or a remove leaves the old state or the new one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onebase_adapters.blobs import file_digest, read_blob
from onebase_adapters.errors import AdapterNotFound

# The child patches one function of the program so that it kills its own process before or after doing its work.
CHILD = """
import importlib, os, signal, sys
from pathlib import Path
from onebase_adapters.store import AdapterStore

root, source, action, moment, module, owner, function = sys.argv[1:]
store = AdapterStore.open(Path(root))
target = importlib.import_module(module)
for part in owner.split("."):
    target = getattr(target, part) if part else target
original = getattr(target, function)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def patched(*args, **kwargs):
    if moment == "before":
        die()
    original(*args, **kwargs)
    die()

setattr(target, function, patched)
store.publish("pirate", Path(source)) if action == "publish" else store.remove("pirate")
"""

STORE, FOLDER = "onebase_adapters.store", "onebase_adapters.blob_folder"
PUBLISH_STEPS = {
    "uploaded files copied": (STORE, "shutil", "copyfile"),
    "blob written to staging": (STORE, "", "write_blob"),
    "blob renamed into place": (FOLDER, "os", "replace"),
    "folder on disk": (FOLDER, "", "sync"),
    "commit": ("sqlalchemy", "Connection", "commit"),
    "staging removed": ("onebase_adapters.staging", "shutil", "rmtree"),
}
ORPHANING = {  # after the rename, before the commit
    ("blob renamed into place", "after"),
    ("folder on disk", "before"),
    ("folder on disk", "after"),
    ("commit", "before"),
}
REMOVE_STEPS = {
    "commit": ("sqlalchemy", "Connection", "commit"),
    "blob deleted": (FOLDER, "Path", "unlink"),
}


def killed(action: str, step: tuple[str, str, str], moment: str, root: Path, source: Path) -> None:
    """Run `action` in a process that is killed before or after a step of it."""
    command = [sys.executable, "-c", CHILD, str(root), str(source), action, moment, *step]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", PUBLISH_STEPS)
def test_a_publish_killed_at_any_step_is_done_or_not_done(step, moment, store, open_store, write_peft):
    old = store.publish("pirate", write_peft(seed=1))
    store.close()
    killed("publish", PUBLISH_STEPS[step], moment, store.root, write_peft(seed=2))

    reopened = open_store()
    live = reopened.resolve("pirate")
    committed = (step, moment) in {("commit", "after"), ("staging removed", "before"), ("staging removed", "after")}
    assert live.version == (2 if committed else 1)
    assert (live == old) is not committed
    for version in reopened.versions("pirate"):
        assert file_digest(reopened.blob_path(version.digest)) == version.digest
        assert read_blob(reopened.blob_path(version.digest)).rank == 4

    report = reopened.verify(repair=True)
    assert not report.damaged
    assert len(report.orphaned_blobs) == ((step, moment) in ORPHANING)
    assert len(report.left_overs) == ((step, moment) != ("staging removed", "after"))
    assert reopened.verify().is_clean
    assert len(list((store.root / "blobs").iterdir())) == live.version
    assert not list((store.root / "staging").iterdir())
    assert reopened.publish("pirate", write_peft(seed=2)).version == live.version + 1


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", REMOVE_STEPS)
def test_a_remove_killed_at_any_step_is_done_or_not_done(step, moment, store, open_store, write_peft):
    source = write_peft()
    store.publish("pirate", source)
    store.close()
    killed("remove", REMOVE_STEPS[step], moment, store.root, source)

    reopened = open_store()
    if (step, moment) == ("commit", "before"):
        assert reopened.verify().is_clean
        assert reopened.resolve("pirate").version == 1
    else:
        with pytest.raises(AdapterNotFound):
            reopened.resolve("pirate")
        assert not reopened.verify(repair=True).damaged
        assert not list((store.root / "blobs").iterdir())
    assert reopened.verify().is_clean
