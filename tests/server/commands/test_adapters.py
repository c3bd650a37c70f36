import shutil


def test_publishing_to_a_new_store_needs_the_base_once(onebase, base, adapter):
    assert "no base was given" in onebase("publish", "pirate", adapter, exit_code=1).stderr
    assert "o_proj" in onebase("publish", "pirate", adapter, "--base", base).stdout
    assert " 2 " in onebase("publish", "pirate", adapter).stdout
    listing = onebase("list").stdout
    assert "Adapters of tiny-llama" in listing
    assert "pirate" in listing


def test_an_archive_is_published_like_a_directory(onebase, base, adapter, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "upload"), "gztar", adapter)
    onebase("publish", "pirate", archive, "--base", base)
    assert "pirate" in onebase("list").stdout
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_versions_are_shown_rolled_back_and_removed(onebase, base, adapter):
    onebase("publish", "pirate", adapter, "--base", base)
    onebase("publish", "pirate", adapter)
    assert "Live now" in onebase("rollback", "pirate").stdout
    shown = onebase("show", "pirate").stdout.splitlines()
    assert [("yes" in line) for line in shown if "o_proj" in line] == [True, False]
    assert "no version 9" in onebase("rollback", "pirate", "--version", 9, exit_code=1).stderr
    onebase("remove", "pirate")
    assert "no adapter pirate" in onebase("show", "pirate", exit_code=1).stderr


def test_verify_fails_until_it_has_repaired(onebase, base, adapter, tmp_path):
    onebase("publish", "pirate", adapter, "--base", base)
    assert "Everything is as it should be" in onebase("verify").stdout
    blob = next((tmp_path / "store" / "blobs").iterdir())
    blob.rename(blob.with_name("stray.safetensors"))
    broken = onebase("verify", exit_code=1).stdout
    assert "pirate@1: its blob" in broken
    assert "stray.safetensors belongs to no version" in broken
    assert "no whole version is left" in onebase("verify", "--repair").stdout
    assert "Everything is as it should be" in onebase("verify").stdout


def test_a_refusal_is_one_sentence_and_exit_status_1(onebase, base, adapter):
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    error = onebase("publish", "pirate", adapter, "--base", base, exit_code=1).stderr
    assert "has shape [4, 32], but this base and adapter_config.json make it [8, 32]." in error
    assert "Traceback" not in error


def test_a_base_without_a_config_is_refused(onebase, adapter, tmp_path):
    assert "no config.json" in onebase("publish", "pirate", adapter, "--base", tmp_path, exit_code=1).stderr
