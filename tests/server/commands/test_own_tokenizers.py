"""`onebase adapters` and the tokenizers that adapters bring."""

import json

import pytest
import tokenizers

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture
def chatty(onebase, base, adapter):
    """The adapter with a chat template of its own, published as pirate."""
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="</s>"))
    backend.save(str(base / "tokenizer.json"))
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    onebase("publish", "pirate", adapter, "--base", base)
    return adapter


@pytest.mark.usefixtures("chatty")
def test_the_list_says_what_an_adapter_brings(onebase):
    assert "chat_template" in onebase("list").stdout


def test_a_directory_with_a_template_can_be_published_without_naming_the_base_again(onebase, chatty):
    assert "chat_template" in onebase("publish", "parrot", chatty).stdout


@pytest.mark.usefixtures("chatty")
def test_an_export_has_the_template_and_the_bases_tokens(onebase, base, tmp_path):
    onebase("export", "pirate", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_an_export_of_an_adapter_with_the_bases_tokenizer_has_none(onebase, base, adapter, tmp_path):
    onebase("publish", "pirate", adapter, "--base", base)
    onebase("export", "pirate", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_merged_adapter_has_its_sources_template_and_other_templates_are_refused(onebase, chatty):
    onebase("publish", "parrot", chatty)
    assert "chat_template" in onebase("merge", "both", "pirate", "parrot=0.5").stdout
    (chatty / "chat_template.jinja").unlink()
    onebase("publish", "plain", chatty)
    refused = onebase("merge", "both", "pirate", "plain", exit_code=1)
    assert "pirate@1 and plain@1 cannot be merged" in " ".join(refused.stderr.split())
