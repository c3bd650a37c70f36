import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from onebase_adapters.adapter import Adapter, ModuleKey
from onebase_adapters.archive import unpack
from onebase_adapters.base_layout import BaseLayout, ExpertLayout
from onebase_adapters.blobs import file_digest, read_blob
from onebase_adapters.errors import AdapterNotFound, StoreError, VersionNotFound
from onebase_adapters.store import AdapterStore

PUBLISH_AND_REMOVE = """
import sys
from pathlib import Path
from onebase_adapters.store import AdapterStore

root, source, name = sys.argv[1:]
store = AdapterStore.open(Path(root))
for _ in range(20):
    with store.lease(store.publish(name, Path(source)).digest):
        store.remove(name)
store.publish(name, Path(source))
"""


def blobs(store: AdapterStore) -> list[Path]:
    return sorted((store.root / "blobs").iterdir())


class TestVersions:
    def test_a_published_adapter_is_live_and_describes_itself(self, store, write_peft, tensors):
        source = write_peft(tensors)
        version = store.publish("pirate", source)
        assert version == store.resolve("pirate") == store.resolve("pirate", 1)
        assert (version.name, version.version, version.label, version.is_live) == ("pirate", 1, "pirate@1", True)
        assert (version.rank, version.targets) == (4, ("q_proj", "v_proj"))
        assert version.nbytes == 4 * version.num_parameters == sum(tensor.nbytes for tensor in tensors.values())
        assert version.source_sha256 == file_digest(source / "adapter_model.safetensors")
        assert version.digest == file_digest(store.blob_path(version.digest))
        pair = read_blob(store.blob_path(version.digest)).pairs[ModuleKey(2, "v_proj")]
        np.testing.assert_array_equal(
            pair.lora_b, tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"]
        )

    def test_an_upload_is_published_from_staging_with_the_digest_that_was_announced(self, store, write_peft, tmp_path):
        source = write_peft()
        archive = Path(shutil.make_archive(str(tmp_path / "upload"), "zip", source))
        digest = file_digest(archive)
        with store.staging() as directory:
            unpack(archive, directory, max_bytes=store.max_upload_bytes)
            version = store.publish("pirate", directory, expected_sha256=digest.upper(), source_sha256=digest)
        assert version.source_sha256 == digest
        assert not list((store.root / "staging").iterdir())

    def test_an_adapter_that_the_caller_does_not_accept_is_not_kept(self, store, write_peft):
        def refuse(adapter: Adapter) -> None:
            raise OverflowError(adapter.num_parameters)

        with pytest.raises(OverflowError):
            store.publish("pirate", write_peft(), accept=refuse)
        assert not store.list_adapters()
        assert not blobs(store)
        assert not list((store.root / "staging").iterdir())

    def test_publishing_a_name_again_makes_the_next_version_live(self, store, write_peft):
        first, second = store.publish("pirate", write_peft(seed=1)), store.publish("pirate", write_peft(seed=2))
        assert (first.version, second.version) == (1, 2)
        assert store.resolve("pirate") == second
        assert store.resolve("pirate", 1) == replace(first, is_live=False)
        assert store.versions("pirate") == [replace(first, is_live=False), second]
        assert store.list_adapters() == [second]

    def test_rollback_goes_down_one_version_at_a_time_or_to_any(self, store, write_peft):
        for seed in range(3):
            store.publish("pirate", write_peft(seed=seed))
        assert store.rollback("pirate").version == 2
        assert store.rollback("pirate").version == 1
        with pytest.raises(VersionNotFound, match="no version below 1"):
            store.rollback("pirate")
        assert store.rollback("pirate", 3).is_live
        with pytest.raises(VersionNotFound, match="no version 4"):
            store.rollback("pirate", 4)
        with pytest.raises(VersionNotFound, match="no version 1000"):
            store.rollback("pirate", 10**30)  # more than SQLite's integers hold
        assert store.resolve("pirate").version == 3
        store.rollback("pirate", 1)
        assert store.publish("pirate", write_peft(seed=9)).version == 4

    def test_a_number_never_comes_again_even_after_a_remove(self, store, write_peft):
        store.publish("pirate", write_peft(seed=1))
        store.publish("pirate", write_peft(seed=2))
        assert [version.version for version in store.remove("pirate")] == [1, 2]
        assert store.publish("pirate", write_peft(seed=3)).version == 3
        with pytest.raises(VersionNotFound):
            store.resolve("pirate", 1)

    def test_what_is_not_there_is_said(self, store, write_peft):
        for look_up in (store.resolve, store.versions, store.rollback, store.remove):
            with pytest.raises(AdapterNotFound, match="no adapter pirate"):
                look_up("pirate")
        store.publish("pirate", write_peft())
        with pytest.raises(VersionNotFound, match="pirate has no version 2"):
            store.resolve("pirate", 2)

    def test_a_store_remembers_everything_when_it_is_opened_again(self, store, open_store, write_peft):
        store.publish("pirate", write_peft(seed=1))
        version = store.publish("pirate", write_peft(seed=2))
        store.close()
        assert open_store().resolve("pirate") == version

    def test_resolve_takes_less_than_200_microseconds(self, store, write_peft):
        for i in range(20):
            store.publish(f"adapter-{i}", write_peft(seed=i))

        def microseconds() -> float:
            start = perf_counter()
            store.resolve("adapter-7")
            return (perf_counter() - start) * 1e6

        assert sorted(microseconds() for _ in range(300))[150] < 200


class TestBase:
    def test_a_store_opens_with_its_own_base_when_none_is_given(self, store, layout):
        opened = AdapterStore.open(store.root)
        assert (opened.layout, opened.base_name) == (layout, "tiny")
        opened.close()

    @pytest.mark.parametrize(
        ("change", "base_name", "message"),
        [
            ({"num_layers": 4}, "tiny", "for base tiny, whose linears differ"),
            ({"shapes": {"q_proj": (64, 64)}}, "large", "those of the base given, large"),
            ({}, "other", "for base tiny, not for other"),
        ],
    )
    def test_a_store_of_another_base_is_refused(self, store, layout, change, base_name, message):
        with pytest.raises(StoreError, match=message):
            AdapterStore.open(store.root, replace(layout, **change), base_name=base_name)

    def test_a_store_that_is_not_there_needs_a_base_and_is_not_made_without(self, tmp_path):
        with pytest.raises(StoreError, match="not an adapter store"):
            AdapterStore.open(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    def test_a_damaged_catalogue_is_refused(self, store):
        store.close()
        (store.root / "catalogue.sqlite3").write_bytes(b"no database" * 1000)
        with pytest.raises(StoreError, match="catalogue"):
            AdapterStore.open(store.root)


class TestBlobs:
    def test_the_same_adapter_is_stored_once(self, store, write_peft):
        assert store.publish("a", write_peft()).digest == store.publish("b", write_peft()).digest
        assert len(blobs(store)) == 1
        store.remove("a")
        assert len(blobs(store)) == 1
        store.remove("b")
        assert not blobs(store)

    def test_a_leased_blob_outlives_its_removal_until_the_last_lease_ends(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        with store.lease(version.digest) as path:
            with store.lease(version.digest):
                store.remove("pirate")
                assert store.verify(repair=True).is_clean
            assert read_blob(path).rank == 4
        assert not path.exists()

    def test_a_lease_holds_against_a_remove_through_another_store(self, store, open_store, write_peft):
        other = open_store()
        version = store.publish("pirate", write_peft())
        with store.lease(version.digest) as path:
            other.remove("pirate")
            assert path.exists()
            assert other.verify(repair=True).is_clean
        assert not path.exists()

    def test_a_blob_published_again_during_a_lease_stays(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        with store.lease(version.digest) as path:
            store.remove("pirate")
            store.publish("pirate", write_peft())
        assert path.exists()
        assert store.verify().is_clean

    def test_a_lease_that_fails_inside_still_ends(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        with pytest.raises(AdapterNotFound), store.lease(version.digest):
            store.rollback(store.remove("pirate")[0].name)
        assert not blobs(store)

    def test_a_removed_blob_cannot_be_leased(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        store.remove("pirate")
        with pytest.raises(AdapterNotFound, match="has been removed"), store.lease(version.digest):
            pass

    def test_a_lease_of_a_published_blob_that_is_missing_says_that_the_store_is_damaged(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        store.blob_path(version.digest).unlink()
        with pytest.raises(StoreError, match="verify --repair"), store.lease(version.digest):
            pass


class TestConcurrency:
    def test_many_threads_publish_one_name_without_losing_a_version(self, store, write_peft):
        sources = [write_peft(seed=seed % 3, name=f"peft-{seed}") for seed in range(24)]
        with ThreadPoolExecutor(8) as pool:
            versions = list(pool.map(lambda source: store.publish("pirate", source), sources))
        assert sorted(version.version for version in versions) == list(range(1, 25))
        assert len(blobs(store)) == 3
        assert store.verify().is_clean

    def test_a_remove_racing_with_a_publish_of_the_same_bytes_never_loses_the_blob(self, store, open_store, write_peft):
        source, other = write_peft(), open_store()
        store.publish("coming", source)
        stop = threading.Event()

        def come_and_go() -> None:
            while not stop.is_set():
                other.publish("going", source)
                other.remove("going")

        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(come_and_go)
            try:
                for _ in range(40):
                    store.remove("coming")
                    version = store.publish("coming", source)
                    with store.lease(version.digest) as path:
                        assert read_blob(path).rank == 4
            finally:
                stop.set()
            going.result()
        assert store.verify().is_clean

    def test_processes_share_a_store(self, store, write_peft):
        source = write_peft()
        commands = [[sys.executable, "-c", PUBLISH_AND_REMOVE, store.root, source, f"n{i}"] for i in range(2)]
        processes = [subprocess.Popen(command) for command in commands]
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
        assert [(version.name, version.version) for version in store.list_adapters()] == [("n0", 21), ("n1", 21)]
        assert store.verify().is_clean

    def test_readers_see_whole_versions_while_others_publish(self, store, write_peft):
        sources = {seed: write_peft(seed=seed, name=f"peft-{seed}") for seed in range(2)}
        digests = {store.publish("pirate", source).digest for source in sources.values()}
        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(lambda: [store.resolve("pirate") for _ in range(200)]) for _ in range(3)]
            for i in range(20):
                store.publish("pirate", sources[i % 2])
            for reader in readers:
                seen = reader.result()
                assert [version.version for version in seen] == sorted(version.version for version in seen)
                assert {version.digest for version in seen} <= digests


class TestVerify:
    def test_a_healthy_store_is_clean(self, store, write_peft):
        store.publish("pirate", write_peft())
        report = store.verify()
        assert report.is_clean
        assert report.versions_checked == 1

    def test_orphans_and_left_overs_are_reported_and_removed_by_a_repair(self, store, write_peft):
        store.publish("pirate", write_peft())
        (store.root / "blobs" / "0123.safetensors").write_bytes(b"")
        (store.root / "staging" / "left").mkdir()
        (store.root / "staging" / "left" / "blob").write_bytes(b"")
        for repair in (False, True):
            report = store.verify(repair)
            assert (report.orphaned_blobs, report.left_overs) == (("0123.safetensors",), ("left",))
            assert not report.is_clean
        assert store.verify().is_clean
        assert store.resolve("pirate").version == 1

    def test_staging_in_use_is_not_a_left_over(self, store, open_store):
        with store.staging() as directory:
            assert open_store().verify(repair=True).is_clean
            assert directory.is_dir()

    @pytest.mark.parametrize("problem", ["missing", "changed"])
    def test_a_version_without_its_whole_blob_is_dropped_and_the_newest_whole_one_goes_live(
        self, store, write_peft, problem
    ):
        for seed in range(3):
            last = store.publish("pirate", write_peft(seed=seed))
        blob = store.blob_path(last.digest)
        if problem == "missing":
            blob.unlink()
        else:
            blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        report = store.verify()
        assert [(damaged.version, damaged.problem) for damaged in report.damaged] == [(last, problem)]
        assert store.resolve("pirate") == last

        assert store.verify(repair=True).now_live == {"pirate": 2}
        assert store.resolve("pirate").version == 2
        assert store.verify().is_clean
        assert store.publish("pirate", write_peft()).version == 4

    def test_an_adapter_without_any_whole_version_is_gone_after_a_repair(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        store.blob_path(version.digest).unlink()
        assert store.verify(repair=True).now_live == {"pirate": None}
        assert store.list_adapters() == []
        with pytest.raises(AdapterNotFound):
            store.resolve("pirate")

    def test_publishing_again_heals_a_blob_that_changed(self, store, write_peft):
        version = store.publish("pirate", write_peft())
        store.blob_path(version.digest).write_bytes(b"rot")
        store.publish("pirate", write_peft())
        assert store.verify().is_clean


def test_a_layout_survives_the_catalogue(tmp_path):
    experts = ExpertLayout(3, {"up_proj": (4, 5)})
    layout = BaseLayout(1, {"z_proj": (3, 5), "a_proj": (7, 5)}, experts, is_fused=True)
    AdapterStore.open(tmp_path / "store", layout, base_name="b").close()
    opened = AdapterStore.open(tmp_path / "store").layout
    assert (opened, opened.experts, list(opened.shapes)) == (layout, experts, ["z_proj", "a_proj"])
    assert opened.is_fused


def test_a_store_from_before_adapters_touched_experts_learns_of_them(tmp_path):
    layout = BaseLayout(1, {"q_proj": (5, 5)}, ExpertLayout(3, {"up_proj": (4, 5)}))
    AdapterStore.open(tmp_path / "store", replace(layout, experts=None), base_name="b").close()
    AdapterStore.open(tmp_path / "store", layout, base_name="b").close()
    assert AdapterStore.open(tmp_path / "store").layout.experts == layout.experts
    with pytest.raises(StoreError, match="whose linears differ"):
        AdapterStore.open(tmp_path / "store", replace(layout, experts=ExpertLayout(4, {"up_proj": (4, 5)})))


def test_a_store_of_an_earlier_version_is_brought_up_to_date(open_store, write_peft, write_prefix):
    store = open_store()
    store.publish("pirate", write_peft())
    store.close()
    with closing(sqlite3.connect(store.root / "catalogue.sqlite3")) as database:
        later = ("num_virtual_tokens", "invocation_tokens", "vocab_size", "tokenizer_digest", "tokenizer_parts")
        for column in later:
            database.execute(f"ALTER TABLE versions DROP COLUMN {column}")
        database.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")
        database.execute("UPDATE meta SET value = json_remove(value, '$.num_kv_heads') WHERE key = 'layout'")
        database.commit()
    assert AdapterStore.open(store.root).layout.num_kv_heads is None
    reopened = open_store()
    assert reopened.layout.num_kv_heads == 2
    assert reopened.resolve("pirate").num_virtual_tokens == 0
    assert reopened.resolve("pirate").vocab_size is None
    assert reopened.publish("prefixed", write_prefix()).num_virtual_tokens == 5
    called = write_peft(name="alora", alora_invocation_tokens=[7, 8])
    assert reopened.publish("called", called).invocation_tokens == (7, 8)
    assert read_blob(reopened.blob_path(reopened.resolve("called").digest)).invocation_tokens == (7, 8)
