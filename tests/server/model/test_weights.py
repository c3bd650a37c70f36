"""From a directory to weights: the NF4 cache, shards, quantised checkpoints, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import onebase_kernels as kernels
from onebase_kernels import WeightGroup, dequantize, quantize_nf4
from onebase_kernels.cpu.library import runnable_variants
from onebase_server.errors import ConfigurationError
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]

TOKENS = list(range(20))
LAYER = "model.layers.1.self_attn.q_proj.weight"


def cached_checkpoint(tmp_path: Path) -> Path:
    (directory,) = (path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir())
    return directory


def all_tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_cache_is_what_bitsandbytes_would_have_written(
    double_quant: bool, make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    load_decoder(tmp_path / "model", engine_settings(double_quant=double_quant))
    cached = all_tensors(cached_checkpoint(tmp_path))
    plain = load_file(tmp_path / "model" / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        key = f"{name}.weight"
        codes, state = bnb.quantize_4bit(plain.pop(key), quant_type="nf4", compress_statistics=double_quant)
        written = {part: cached.pop(f"{key}.{part}") for part in state.as_dict(packed=True)}
        assert torch.equal(cached.pop(key), codes)
        for part, expected in state.as_dict(packed=True).items():
            if not part.startswith("quant_state"):
                assert torch.equal(written[part], expected), part
        read_back = bnb.QuantState.from_dict(written, torch.device("cpu"))
        assert torch.equal(bnb.dequantize_4bit(codes, read_back), bnb.dequantize_4bit(codes, state))
    assert cached.keys() == plain.keys()
    assert all(torch.equal(cached[name], plain[name]) for name in plain)


def test_transformers_reads_the_cache_as_a_quantised_checkpoint(
    make_model: MakeModel, engine_settings: MakeSettings, logits_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    make_model("llama")
    decoder = load_decoder(tmp_path / "model", engine_settings())
    theirs = AutoModelForCausalLM.from_pretrained(cached_checkpoint(tmp_path), dtype=torch.float32).eval()
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":  # not through bitsandbytes' bf16 product
            weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            theirs.set_submodule(name, torch.nn.Linear(*weight.T.shape, bias=False))
            theirs.get_submodule(name).weight.data = weight.float()
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(decoder, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_the_second_load_quantises_nothing_and_computes_the_same(
    make_model: MakeModel, engine_settings: MakeSettings, logits_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    make_model("llama")
    progress: list[tuple[int, int]] = []
    first = load_decoder(tmp_path / "model", engine_settings(), lambda done, total: progress.append((done, total)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    second = load_decoder(tmp_path / "model", engine_settings(), lambda done, total: progress.append((done, total)))
    assert len(progress) == 4
    assert torch.equal(logits_of(first, TOKENS), logits_of(second, TOKENS))


def test_other_weights_or_options_make_another_cached_form(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings())
    load_decoder(tmp_path / "model", engine_settings(double_quant=False))
    change_tensors(tmp_path / "model", lambda tensors: tensors[LAYER].zero_())
    decoder = load_decoder(tmp_path / "model", engine_settings())
    assert sum(path.is_dir() for path in (tmp_path / "cache" / "nf4").iterdir()) == 3
    (packed,) = decoder.weights.layers[1].qkv.parts
    assert isinstance(packed, WeightGroup)
    assert not packed.weights[0].scales().any()


def test_a_build_that_fails_leaves_nothing_behind(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")

    def fail(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_decoder(tmp_path / "model", engine_settings(), fail)
    assert not [path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir()]
    load_decoder(tmp_path / "model", engine_settings())


def test_what_a_killed_build_left_is_cleared_away(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings())
    whole = cached_checkpoint(tmp_path)
    whole.rename(whole.with_suffix(".partial"))
    load_decoder(tmp_path / "model", engine_settings())
    assert cached_checkpoint(tmp_path) == whole


def test_shards_are_one_checkpoint(
    make_model: MakeModel, engine_settings: MakeSettings, logits_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    make_model("qwen2", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    sharded = load_decoder(tmp_path / "model", engine_settings())
    make_model("qwen2")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    single = load_decoder(tmp_path / "model", engine_settings())
    assert torch.equal(logits_of(sharded, TOKENS), logits_of(single, TOKENS))


def test_a_quantised_checkpoint_is_used_as_it_is(
    make_model: MakeModel, engine_settings: MakeSettings, logits_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    make_model("qwen3", dtype=torch.bfloat16)
    ours = load_decoder(tmp_path / "model", engine_settings())
    quantised = cached_checkpoint(tmp_path)
    for overrides in ({}, {"quantization": "none"}, {"double_quant": False}):
        decoder = load_decoder(quantised, engine_settings(cache_dir=tmp_path / "unused", **overrides))
        assert torch.equal(logits_of(decoder, TOKENS), logits_of(ours, TOKENS))
    assert not (tmp_path / "unused").exists()


def test_a_linear_that_a_quantised_checkpoint_left_alone_stays_so(
    make_model: MakeModel, engine_settings: MakeSettings, logits_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    make_model("llama")
    ours = load_decoder(tmp_path / "model", engine_settings())
    quantised, plain = cached_checkpoint(tmp_path), load_file(tmp_path / "model" / "model.safetensors")
    tensors = all_tensors(quantised)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)} | {LAYER: plain[LAYER]}
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(tensors, mixed / "model.safetensors")
    (mixed / "config.json").write_text((quantised / "config.json").read_text())
    decoder = load_decoder(mixed, engine_settings())
    assert torch.equal(decoder.weights.layers[1].qkv.parts[0], plain[LAYER])
    assert not torch.equal(logits_of(decoder, TOKENS), logits_of(ours, TOKENS))


def test_the_report_counts_every_part(make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True, hidden_size=512, intermediate_size=512)
    linears = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("proj"))
    nf4 = load_decoder(tmp_path / "model", engine_settings(dtype="bfloat16"))
    report = nf4.weights.report()
    assert report.linear_parameters == linears
    assert report.bits_per_parameter == pytest.approx(4.127, abs=0.01)
    assert report.embedding_bytes == 97 * 512 * 2
    assert report.other_bytes == 7 * 512 * 2
    assert nf4.weight_bytes == report.total_bytes
    plain = load_decoder(tmp_path / "model", engine_settings(quantization="none"))
    assert plain.weights.report().bits_per_parameter == 32
    assert plain.weights.head is plain.weights.embedding


def test_only_a_head_of_which_the_best_tokens_are_asked_has_a_screen(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softcap makes equals of unequal logits, so their base has all of them computed."""
    heads: list[torch.Tensor] = []
    monkeypatch.setattr(kernels, "pack_screen", heads.append)
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings())
    assert len(heads) == 1
    load_decoder(tmp_path / "model", engine_settings(screen_head=False))
    make_model("gemma2", sliding_window=9, query_pre_attn_scalar=20, final_logit_softcapping=5.0)
    load_decoder(tmp_path / "model", engine_settings())
    assert len(heads) == 1


def test_a_quantised_head_gives_the_logits_of_its_rounded_weights(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama", tie_word_embeddings=True)
    plain = load_decoder(tmp_path / "model", engine_settings())
    quantised = load_decoder(tmp_path / "model", engine_settings(quantize_head=True))
    embedding = plain.weights.embedding
    assert torch.equal(quantised.weights.embedding, embedding)
    hidden = torch.randn(3, embedding.shape[1])
    rounded = dequantize(quantize_nf4(embedding), torch.float32)
    torch.testing.assert_close(quantised.compute_logits(hidden), hidden @ rounded.T, rtol=1e-4, atol=1e-5)
    assert quantised.weights.report().embedding_bytes > embedding.nbytes


@pytest.mark.skipif(not runnable_variants(), reason="packs by the C++ kernels, which are not built here")
def test_what_was_packed_lets_go_of_its_file(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama", attention_bias=True)
    kernels.use_backend("cpu")
    try:
        decoder = load_decoder(tmp_path / "model", engine_settings())
    finally:
        kernels.use_backend("reference")
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    quantised = {Path(file).name for file in mapped if file.startswith(str(tmp_path / "cache"))}
    assert quantised <= {"model-00001-of-00004.safetensors"}, "only the embedding's, which is not packed"
    assert decoder.weights.layers[0].qkv.bias is not None


MEASURE_PEAK = """
import resource, sys
from pathlib import Path
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings
from onebase_kernels import quantize_nf4
import torch

quantize_nf4(torch.zeros(64, 64))  # what torch allocates once
directory, cache = Path(sys.argv[1]), Path(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
decoder = load_decoder(directory, EngineSettings(base="", cache_dir=cache, max_model_len=64))
print(peak() - before, decoder.weight_bytes)
"""


def test_quantising_needs_little_more_memory_than_its_result(make_model: MakeModel, tmp_path: Path) -> None:
    """The unquantised model is never in memory: only a layer of it, and a few chunks to compute with."""
    make_model(
        "llama", dtype=torch.bfloat16, hidden_size=1024, intermediate_size=3072, head_dim=64, num_hidden_layers=12
    )
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE_PEAK, str(tmp_path / "model"), str(tmp_path / "cache")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, result = map(int, output.split())
    layer, chunks = size / 12, 64 << 20
    assert peak < result + layer + chunks < size


def test_missing_tensors_are_named(make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path) -> None:
    make_model("llama")
    change_tensors(tmp_path / "model", lambda tensors: tensors.pop(LAYER))
    with pytest.raises(ConfigurationError, match=f"lacks tensors of the model: {LAYER}"):
        load_decoder(tmp_path / "model", engine_settings())


def test_tensors_that_would_be_ignored_are_named(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    bias = LAYER.replace("weight", "bias")
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({bias: torch.ones(64)}))
    with pytest.raises(ConfigurationError, match=f"does not have: {bias}"):
        load_decoder(tmp_path / "model", engine_settings())


def test_leftovers_of_old_checkpoints_do_no_harm(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama", tie_word_embeddings=True)
    leftovers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": torch.zeros(97, 64),
    }
    change_tensors(tmp_path / "model", lambda tensors: tensors.update(leftovers))
    decoder = load_decoder(tmp_path / "model", engine_settings())
    assert decoder.weights.head.any()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_shapes_that_contradict_the_configuration_are_named(
    quantization: str, make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({LAYER: torch.zeros(64, 128)}))
    said = r"q_proj\.weight has the shape \[64, 128\]; config\.json says \[64, 64\]"
    with pytest.raises(ConfigurationError, match=said):
        load_decoder(tmp_path / "model", engine_settings(quantization=quantization))
    assert not (tmp_path / "cache").exists()


def test_quantised_weights_that_are_incomplete_or_of_another_shape_are_named(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings())
    tensors = all_tensors(cached_checkpoint(tmp_path))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((cached_checkpoint(tmp_path) / "config.json").read_text())
    other = LAYER.replace("q_proj", "k_proj")
    k_proj = {name.replace("k_proj", "q_proj"): tensor for name, tensor in tensors.items() if name.startswith(other)}
    for change, said in (
        (k_proj, r"has the shape \[32, 64\]; config\.json says \[64, 64\]"),
        ({f"{LAYER}.absmax": tensors[f"{LAYER}.absmax"][:-1]}, "is not a complete bitsandbytes 4-bit weight"),
        ({LAYER: tensors[LAYER][:-1]}, "is not a complete bitsandbytes 4-bit weight"),
    ):
        # cloned, for safetensors does not write tensors that share memory
        save_file({name: tensor.clone() for name, tensor in (tensors | change).items()}, damaged / "model.safetensors")
        with pytest.raises(ConfigurationError, match=said):
            load_decoder(damaged, engine_settings())
    save_file({name: tensors[name] for name in tensors if name != f"{LAYER}.absmax"}, damaged / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"is not a complete .*q_proj\.weight\.absmax"):
        load_decoder(damaged, engine_settings())


def test_files_that_are_not_there_or_cut_off_are_named(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    directory = tmp_path / "model"
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors cannot be read as safetensors"):
        load_decoder(directory, engine_settings())
    file.unlink()
    with pytest.raises(ConfigurationError, match="holds neither"):
        load_decoder(directory, engine_settings())
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConfigurationError, match="names files that are not there: model-00001-of-00002"):
        load_decoder(directory, engine_settings())
    index.write_text("[]")
    with pytest.raises(ConfigurationError, match="is not a safetensors index"):
        load_decoder(directory, engine_settings())


def test_a_context_beyond_the_models_is_refused(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    with pytest.raises(ConfigurationError, match="--max-model-len 65 is beyond the model's context of 64"):
        load_decoder(tmp_path / "model", engine_settings(max_model_len=65))
    assert load_decoder(tmp_path / "model", engine_settings(max_model_len=None)).max_model_len == 64


def test_a_cache_that_cannot_be_written_is_named(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="Name a writable directory with enough space: --cache-dir"):
        load_decoder(tmp_path / "model", engine_settings(cache_dir=tmp_path / "file"))
