"""A merged checkpoint is what PEFT merges, and Transformers loads it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onebase_adapters.adapter import Adapter, ModuleKey
from onebase_adapters.peft_format import parse
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.merged_checkpoint import ExportForm, export_merged
from onebase_server.model.weights import load_decoder

MakeModel = Callable[..., PreTrainedModel]

TOKENS = torch.arange(20).unsqueeze(0)
TOUCHED, UNTOUCHED = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.k_proj"
UNQUANTISED = ExportForm(dtype="float32", base_quantization="none")


@pytest.fixture
def base(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model("qwen2")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def peft_directory(base: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def adapter(base: Path, peft_directory: Path) -> Adapter:
    return parse(peft_directory, ModelConfig.from_directory(base).adapter_layout(), max_rank=8)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def merged_by_peft(base: Path, peft_directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_adapter(str(peft_directory))
    return model.eval()


def test_merged_unquantised_it_is_what_peft_computes(base, adapter, peft_directory, tmp_path):
    export_merged(base, adapter, tmp_path / "out", UNQUANTISED)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(logits(ours), logits(merged_by_peft(base, peft_directory)), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_fused_linears_are_merged_part_by_part(make_model, tmp_path):
    base, peft_directory = tmp_path / "model", tmp_path / "peft"
    config = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(make_model("phi3"), config).save_pretrained(peft_directory)
    whole = parse(peft_directory, ModelConfig.from_directory(base).adapter_layout(), max_rank=8)
    export_merged(base, whole, tmp_path / "out", UNQUANTISED)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(ours), logits(merged_by_peft(base, peft_directory)), rtol=1e-4, atol=1e-4)

    name = "model.layers.0.self_attn.qkv_proj"
    of_k_alone = Adapter({key: pair for key, pair in whole.pairs.items() if key == ModuleKey(0, "k_proj")})
    (error,) = export_merged(base, of_k_alone, tmp_path / "k", UNQUANTISED)
    assert error.name == name
    changed = (tensors_of(tmp_path / "k")[f"{name}.weight"] != tensors_of(base)[f"{name}.weight"]).any(dim=1)
    assert changed.tolist() == [False] * 64 + [True] * 32 + [False] * 32


@pytest.mark.parametrize("parameters", [[], ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]])
def test_experts_and_routers_are_merged_or_stay_as_they_are(parameters, make_model, tmp_path):
    base, peft_directory = tmp_path / "model", tmp_path / "peft"
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=parameters, init_lora_weights=False)
    get_peft_model(make_model("mixtral", num_local_experts=4), config).save_pretrained(peft_directory)
    adapter = parse(peft_directory, ModelConfig.from_directory(base).adapter_layout(), max_rank=8)
    export_merged(base, adapter, tmp_path / "out", UNQUANTISED)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(ours), logits(merged_by_peft(base, peft_directory)), rtol=1e-4, atol=1e-4)


def test_merged_as_served_it_is_the_base_that_nf4_stands_for_and_the_adapter(base, adapter, tmp_path):
    export_merged(base, adapter, tmp_path / "out", ExportForm(dtype="float32"))
    written, source = tensors_of(tmp_path / "out"), tensors_of(base)
    for name in (TOUCHED, UNTOUCHED):
        codes, state = bnb.quantize_4bit(source[f"{name}.weight"], quant_type="nf4", compress_statistics=True)
        update = torch.zeros(())
        if name == TOUCHED:
            pair = adapter.pairs[ModuleKey(1, "v_proj")]
            update = pair.scale * torch.from_numpy(pair.lora_b @ pair.lora_a)
        expected = bnb.dequantize_4bit(codes, state) + update
        torch.testing.assert_close(written[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once_and_the_error_is_told(base, adapter, tmp_path):
    exact = {error.name: error for error in export_merged(base, adapter, tmp_path / "exact", UNQUANTISED)}
    rounded = export_merged(base, adapter, tmp_path / "out", ExportForm(base_quantization="none"))
    written, merged = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "exact")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[name], merged[name].bfloat16()) for name in merged)
    assert {error.name for error in rounded} == {
        f"model.layers.{layer}.{module}" for layer in range(3) for module in ("self_attn.v_proj", "mlp.down_proj")
    }
    for error in rounded:
        assert exact[error.name].error == 0
        assert 1e-4 < error.relative < 4e-3, "bfloat16 has 8 bits"
        assert error.of_update == pytest.approx(error.error / error.update)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_what_bitsandbytes_makes_of_the_merged_weight(double_quant, base, adapter, tmp_path):
    form = ExportForm(quantization="nf4", dtype="float32", double_quant=double_quant)
    errors = export_merged(base, adapter, tmp_path / "out", form)
    export_merged(base, adapter, tmp_path / "dense", ExportForm(dtype="float32", double_quant=double_quant))
    written, merged = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "dense")[f"{TOUCHED}.weight"]
    codes, state = bnb.quantize_4bit(merged, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(written[f"{TOUCHED}.weight"], codes)
    distance = bnb.dequantize_4bit(codes, state) - merged
    (error,) = (error for error in errors if error.name == TOUCHED)
    assert error.relative == pytest.approx(float(distance.norm() / merged.norm()), rel=1e-4)


@pytest.mark.parametrize("quantization", ["fp4", "int4", "int8"])
def test_the_adapter_is_added_to_the_base_as_it_is_served(quantization, base, adapter, engine_settings, tmp_path):
    decoder = load_decoder(base, engine_settings(quantization=quantization, group_size=32))
    form = ExportForm(dtype="float32", base_quantization=quantization, group_size=32)
    export_merged(base, adapter, tmp_path / "out", form)
    served = decoder.weights.layers[1].qkv.weight(1)
    assert torch.equal(tensors_of(tmp_path / "out")[f"{UNTOUCHED}.weight"], served)


def test_linears_that_the_adapter_leaves_alone_keep_their_codes(base, adapter, engine_settings, tmp_path):
    load_decoder(base, engine_settings())
    (cached,) = (path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir())
    export_merged(cached, adapter, tmp_path / "out", ExportForm(quantization="nf4", dtype="float32"))
    written, served = tensors_of(tmp_path / "out"), tensors_of(cached)
    assert written.keys() == served.keys()
    assert torch.equal(written[f"{UNTOUCHED}.weight"], served[f"{UNTOUCHED}.weight"])
    assert not torch.equal(written[f"{TOUCHED}.weight"], served[f"{TOUCHED}.weight"])


def test_transformers_and_onebase_load_the_nf4_form(base, adapter, engine_settings, logits_of, tmp_path):
    export_merged(base, adapter, tmp_path / "out", ExportForm(quantization="nf4", dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that shortcut computes in bf16 whatever the dtype says
    ours = logits_of(load_decoder(tmp_path / "out", engine_settings()), TOKENS[0].tolist())
    torch.testing.assert_close(ours, logits(theirs)[0], rtol=1e-4, atol=1e-4)


def test_an_export_that_fails_leaves_nothing_behind(base, adapter, tmp_path):
    def fail(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_merged(base, adapter, tmp_path / "out", UNQUANTISED, fail)
    with pytest.raises(ConfigurationError, match="already exists"):
        export_merged(base, adapter, base, UNQUANTISED)
    assert set(tmp_path.iterdir()) == before
