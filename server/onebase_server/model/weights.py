"""From a model directory to a decoder that can compute: quantised on the way, or read as it is.

It knows files and names (`checkpoint`, `names`, `weight_formats`, `quantized_cache`) and fills `decoder`'s weights; it
computes nothing itself.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import HeadScreen, PackedWeights, quantize_nf4
from onebase_server.errors import ConfigurationError
from onebase_server.model import names, weight_formats
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.checkpoint_writer import Progress
from onebase_server.model.config import ModelConfig, ProjectionGroup
from onebase_server.model.decoder import Decoder
from onebase_server.model.decoder_weights import DecoderWeights, LayerNorms, LayerWeights
from onebase_server.model.linear import Linear, LinearGroup
from onebase_server.model.mlp import ExpertMlp, GatedMlp, Mlp
from onebase_server.model.norm import LayerNorm, Norm, RmsNorm
from onebase_server.model.quantized_cache import quantized_checkpoint
from onebase_server.model.weight_formats import Quantization
from onebase_server.model.weight_report import read_error
from onebase_server.settings import EngineSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def load_decoder(directory: Path, settings: EngineSettings, on_progress: Progress | None = None) -> Decoder:
    """A decoder with the weights of a Hugging Face directory, its linears quantised as `settings` say.

    The quantised form is made once and kept in the cache directory; a checkpoint that came quantised is used as it is,
    whatever the settings say. On the CPU, what no back end packs is mapped from the file, not copied, wherever
    its dtype is right. `on_progress` hears of quantisation only, so not when the cache has its result.

    Raises:
        ConfigurationError: the directory, the model's configuration or its tensors are not what can be served; CUDA is
            asked for and not there; or `max_model_len` is beyond the model's context.
    """
    config = ModelConfig.from_directory(directory)
    context = _served_context(config, settings.max_model_len)
    device = resolve_device(settings.device)
    checkpoint = Checkpoint(directory)
    check_tensors(checkpoint, config)
    quantization = Quantization.of(settings)
    if quantization is not None and config.quantization is None:
        checkpoint = quantized_checkpoint(checkpoint, config, settings.cache_dir, quantization, device, on_progress)
    weights = _Loader(checkpoint, config, settings, device).load()
    return Decoder(config, weights, context)


def resolve_device(name: str) -> torch.device:
    """The device that the setting stands for; `auto` is CUDA where there is one."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigurationError("--device cuda: this machine has no CUDA device that torch can use.")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)


def _served_context(config: ModelConfig, max_model_len: int | None) -> int:
    if max_model_len is None:
        return config.max_context
    if max_model_len > config.max_context:
        raise ConfigurationError(
            f"--max-model-len {max_model_len} is beyond the model's context of {config.max_context} tokens."
        )
    return max_model_len


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise where tensors are missing or of wrong shapes, or where there are some that would silently be ignored."""
    directory, found, expected = checkpoint.directory, checkpoint.shapes, names.all_shapes(config)
    stored = {name: weight_formats.tensor_names(name, found) for name in expected}
    known = {tensor for tensors in stored.values() for tensor in tensors}
    if missing := known - found.keys():
        raise ConfigurationError(f"{directory} lacks tensors of the model: {names.listed(missing)}.")
    unexpected = {name for name in found.keys() - known if not names.is_ignored(name, config)}
    unexpected = {name for name in unexpected if not _is_bias_of_zeros(checkpoint, name)}
    if unexpected:
        raise ConfigurationError(
            f"{directory} has tensors that a {config.family} model of this config.json does not have: "
            f"{names.listed(unexpected)}."
        )
    quantised = {name for name in expected if stored[name] != [name]}
    if quantised and config.quantization is None:
        raise ConfigurationError(
            f"{directory} has quantised tensors, but its config.json no quantization_config: {names.listed(quantised)}."
        )
    for name, shape in expected.items():
        if name not in quantised:  # the shape of a quantised weight is not that of its codes
            _check_shape(directory, name, found[name], shape)


def _is_bias_of_zeros(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it changes nothing: some GPTQ tools write such a bias for every linear."""
    return name.endswith(".bias") and not checkpoint.read([name])[name].any()


def _check_shape(directory: Path, name: str, found: names.Shape, expected: names.Shape) -> None:
    if found != expected:
        raise ConfigurationError(f"{directory}: {name} has the shape {list(found)}; config.json says {list(expected)}.")


class _Loader:
    """Reads a checkpoint's tensors into a decoder's weights."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, settings: EngineSettings, device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.settings = settings
        self.dtype = _DTYPES[settings.dtype]
        self.device = device

    def load(self) -> DecoderWeights:
        """Everything, layer by layer."""
        tensors = self.checkpoint.read(names.outer_shapes(self.config))
        embedding = self._dense(tensors[names.EMBEDDING])
        head = embedding if self.config.tie_word_embeddings else self._dense(tensors[names.HEAD])
        packed_head = self._pack_head(head)
        if head is embedding and isinstance(packed_head, Tensor):
            embedding = packed_head
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(layer) for layer in range(self.config.num_layers)),
            norm=self._norm(tensors, names.FINAL_NORM, self.config.scales.logits),
            head=packed_head,
            screen=self._screen(packed_head),
            quantization_error=read_error(self.checkpoint.directory),
        )

    def _pack_head(self, weight: Tensor) -> Tensor | PackedWeights:
        if self.settings.quantize_head:
            return kernels.pack_quantized([quantize_nf4(weight, self.settings.double_quant)])
        return kernels.pack_dense(weight)

    def _screen(self, head: Tensor | PackedWeights) -> HeadScreen | None:
        """None where it is not wanted, or could not be used: a softcap makes equals of unequal logits."""
        is_used = self.settings.screen_head and self.config.scales.logits_softcap is None
        return kernels.pack_screen(head) if is_used and isinstance(head, Tensor) else None

    def _layer(self, layer: int) -> LayerWeights:
        shapes = names.layer_shapes(self.config, layer)
        stored = (weight_formats.tensor_names(name, self.checkpoint.shapes) for name in shapes)
        tensors = self.checkpoint.read(chain.from_iterable(stored))
        groups = self.config.projection_groups
        qkv, o, *mlp = (
            self._group(tensors, group, layer, place) for place, group in enumerate(groups, layer * len(groups))
        )
        return LayerWeights(norms=self._norms(tensors, layer), qkv=qkv, o=o, mlp=self._mlp(mlp))

    def _mlp(self, groups: Sequence[LinearGroup]) -> Mlp:
        """Of the groups that a layer has behind attention."""
        activation, config = self.config.activation, self.config.experts
        if config is None:
            gate_up, down = groups
            return GatedMlp(gate_up, down, activation)
        router, *of_experts = groups
        pairs = zip(of_experts[::2], of_experts[1::2], strict=True)
        experts = tuple(GatedMlp(gate_up, down, activation) for gate_up, down in pairs)
        return ExpertMlp(router, experts, config.per_token, config.is_normalized)

    def _norms(self, tensors: Mapping[str, Tensor], layer: int) -> LayerNorms:
        places = self.config.norm_places
        return LayerNorms(
            *(None if norm is None else self._norm(tensors, names.norm_name(layer, norm)) for norm in places)
        )

    def _norm(self, tensors: Mapping[str, Tensor], module: str, scale: float = 1.0) -> Norm:
        """The norm of that module, its result multiplied by `scale`."""
        norms = self.config.norms
        weight = self._vector((tensors[f"{module}.weight"].float() + norms.weight_offset) * scale)
        if norms.kind == "rms":
            return RmsNorm(weight, norms.eps)
        return LayerNorm(weight, self._vector(tensors[f"{module}.bias"].float() * scale), norms.eps)

    def _group(self, tensors: Mapping[str, Tensor], group: ProjectionGroup, layer: int, place: int) -> LinearGroup:
        linears = []
        for linear in group.linears:
            module = names.linear_name(self.config, layer, linear.name, group.expert)
            linears.append(self._linear(tensors, module, (sum(linear.widths), group.in_features)))
        return LinearGroup.build(linears, group.widths, place)

    def _linear(self, tensors: Mapping[str, Tensor], module: str, shape: names.Shape) -> Linear:
        name = f"{module}.weight"
        bias = tensors.get(f"{module}.bias")
        bias = None if bias is None else self._vector(bias)
        weight = weight_formats.from_tensors(name, tensors, self.config.quantization)
        if isinstance(weight, Tensor):
            return Linear(self._dense(weight), bias)
        _check_shape(self.checkpoint.directory, name, weight.shape, shape)
        return Linear(weight.to(self.device), bias)

    def _dense(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _vector(self, tensor: Tensor) -> Tensor:
        """A norm or a bias, copied: a view would keep its file mapped, and in memory what was packed."""
        return tensor.to(self.device, self.dtype, copy=True)
