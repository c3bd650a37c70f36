import gzip
import io
import stat
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_adapters.archive import unpack
from onebase_adapters.errors import InvalidArchive, InvalidConfig, InvalidTensors, InvalidUpload, UploadTooLarge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD = {CONFIG: b"{}", WEIGHTS: b"weights"}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_tar_gz(path: Path, files: dict[str, bytes]) -> Path:
    return write_tar(path, files, "w:gz")


WRITERS = [write_zip, write_tar, write_tar_gz]
every_kind = pytest.mark.parametrize("write", WRITERS)


@pytest.fixture
def target(tmp_path):
    directory = tmp_path / "work" / "target"
    directory.mkdir(parents=True)
    return directory


def unpacked(archive: Path, target: Path, **limits: int) -> dict[str, bytes]:
    unpack(archive, target, **{"max_bytes": 1 << 20, **limits})
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*")}


@every_kind
@pytest.mark.parametrize("folder", ["", "./", "my-adapter/", "./my-adapter/"])
def test_an_adapter_is_found_at_the_root_or_in_one_folder(write, folder, target, tmp_path):
    files = {folder + name: data for name, data in GOOD.items()}
    assert unpacked(write(tmp_path / "upload", files), target) == GOOD


@every_kind
def test_other_files_are_ignored(write, target, tmp_path):
    others = {"README.md": b"#", "tokenizer.model": b"{}", "optimizer.pt": b"pickle", "checkpoint-5/" + CONFIG: b"old"}
    assert unpacked(write(tmp_path / "upload", {**others, **GOOD}), target) == GOOD


@every_kind
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "..", "a\\..\\evil", "C:evil", "C:\\evil"])
def test_a_path_that_leads_out_is_refused_even_where_it_would_be_ignored(write, name, target, tmp_path):
    archive = write(tmp_path / "upload", {**GOOD, name: b"evil"})
    with pytest.raises(InvalidArchive, match=r"evil|'\.\.'"):
        unpacked(archive, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=repr
)
def test_links_and_devices_in_a_tar_are_refused(kind, target, tmp_path):
    archive = write_tar(tmp_path / "upload", {CONFIG: b"{}"})
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo(WEIGHTS)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InvalidArchive, match="a link or a device"):
        unpacked(archive, target)


def test_a_link_in_a_zip_is_refused(target, tmp_path):
    archive = write_zip(tmp_path / "upload", {CONFIG: b"{}"})
    with zipfile.ZipFile(archive, "a") as file:
        info = zipfile.ZipInfo(WEIGHTS)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidArchive, match="a link or a device"):
        unpacked(archive, target)


@every_kind
def test_a_bomb_is_stopped_at_the_limit(write, target, tmp_path):
    archive = write(tmp_path / "upload", {CONFIG: b"{}", WEIGHTS: bytes(64 << 20)})
    with pytest.raises(UploadTooLarge, match="more than 1048576 bytes"):
        unpacked(archive, target)
    assert sum(path.stat().st_size for path in target.iterdir()) <= 1 << 20


def test_a_zip_that_lies_about_its_sizes_writes_no_more_than_the_limit(target, tmp_path):
    archive = write_zip(tmp_path / "upload", {CONFIG: b"{}", WEIGHTS: bytes(8 << 20)})
    data = archive.read_bytes()
    archive.write_bytes(data.replace((8 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(InvalidUpload):
        unpacked(archive, target)
    assert sum(path.stat().st_size for path in target.iterdir()) <= 1 << 20


def test_a_bomb_in_an_ignored_file_of_a_tar_gz_is_stopped_too(target, tmp_path):
    archive = write_tar_gz(tmp_path / "upload", {"README.md": bytes(64 << 20), **GOOD})
    with pytest.raises(UploadTooLarge):
        unpacked(archive, target)


@every_kind
def test_too_many_files_are_refused(write, target, tmp_path):
    archive = write(tmp_path / "upload", {**{str(i): b"" for i in range(20)}, **GOOD})
    with pytest.raises(UploadTooLarge, match="more than 10 files"):
        unpacked(archive, target, max_files=10)


def test_a_zip_with_an_endless_list_of_files_is_refused_before_it_is_read(target, tmp_path):
    archive = write_zip(tmp_path / "upload", {f"{'x' * 60_000}{i}": b"" for i in range(80)})
    with pytest.raises(UploadTooLarge, match="list of files"):
        unpacked(archive, target)


@every_kind
def test_a_pickle_is_refused_with_the_advice_to_save_as_safetensors(write, target, tmp_path):
    archive = write(tmp_path / "upload", {f"a/{CONFIG}": b"{}", "a/adapter_model.bin": b"\x80\x04"})
    with pytest.raises(InvalidTensors, match=r"adapter_model\.bin may hold a pickle.*safe_serialization=True"):
        unpacked(archive, target)
    assert not list(target.iterdir())


@every_kind
def test_several_adapters_in_one_archive_are_refused(write, target, tmp_path):
    files = {f"{folder}/{name}": data for folder in ("a", "b") for name, data in GOOD.items()}
    with pytest.raises(InvalidArchive, match="several adapters"):
        unpacked(write(tmp_path / "upload", files), target)


@every_kind
def test_an_adapter_two_folders_deep_is_not_found(write, target, tmp_path):
    with pytest.raises(InvalidConfig, match="no adapter_config"):
        unpacked(write(tmp_path / "upload", {f"a/b/{name}": data for name, data in GOOD.items()}), target)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(target, tmp_path):
    with tarfile.open(tmp_path / "upload", "w") as tar, zipfile.ZipFile(tmp_path / "zip", "w") as file:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo(CONFIG))
            file.writestr(CONFIG, "{}")
    for archive in (tmp_path / "upload", tmp_path / "zip"):
        with pytest.raises(InvalidArchive, match="twice"):
            unpacked(archive, target)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04junk", gzip.compress(b"hello"), b"\x1f\x8bjunk"])
def test_what_is_no_archive_is_refused(data, target, tmp_path):
    (tmp_path / "upload").write_bytes(data)
    with pytest.raises(InvalidArchive, match="not an intact zip"):
        unpacked(tmp_path / "upload", target)


def test_an_encrypted_zip_is_refused(target, tmp_path):
    archive = write_zip(tmp_path / "upload", GOOD)
    data = bytearray(archive.read_bytes())
    for signature, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + flags_at] |= 1
            position = data.find(signature, position + 1)
    archive.write_bytes(data)
    with pytest.raises(InvalidArchive, match="encrypted"):
        unpacked(archive, target)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(WRITERS))
def test_a_damaged_archive_is_refused_or_unpacked_but_never_crashes_or_escapes(data, kind, tmp_path_factory):
    workspace = tmp_path_factory.mktemp("damage")
    target = workspace / "work" / "target"
    target.mkdir(parents=True)
    archive = kind(workspace / "upload", {**GOOD, "README.md": b"hello" * 50})
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    archive.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with suppress(InvalidUpload):
        unpack(archive, target, max_bytes=1 << 20)
    assert {path.name for path in target.iterdir()} <= set(GOOD)
    assert {path.name for path in workspace.rglob("*")} <= {"upload", "work", "target", *GOOD}


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["..", ".", "", "a", "...", CONFIG, "\\", "C:"]), min_size=1, max_size=5))
def test_no_member_name_leads_out(parts, tmp_path_factory):
    workspace = tmp_path_factory.mktemp("names")
    target = workspace / "work" / "target"
    target.mkdir(parents=True)
    archive = write_tar(workspace / "upload", {"/".join(parts): b"evil", WEIGHTS: b"weights"})
    with suppress(InvalidUpload):
        unpack(archive, target, max_bytes=1 << 20)
    assert {path.name for path in workspace.rglob("*")} <= {"upload", "work", "target", *GOOD}
