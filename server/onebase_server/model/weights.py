"""From a model directory to a decoder that can compute: quantised on the way, or read as it is.

It knows files and names (`checkpoint`, `names`, `bnb_format`, `nf4_cache`) and fills `decoder`'s weights; it computes
nothing itself.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from onebase_server.errors import ConfigurationError
from onebase_server.model import bnb_format, names
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder import Decoder
from onebase_server.model.decoder_weights import DecoderWeights, LayerWeights
from onebase_server.model.linear import Linear, LinearGroup
from onebase_server.model.nf4_cache import Progress, nf4_checkpoint
from onebase_server.settings import EngineSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def load_decoder(directory: Path, settings: EngineSettings, on_progress: Progress | None = None) -> Decoder:
    """A decoder with the weights of a Hugging Face directory, its linears in NF4 unless `settings` say otherwise.

    The NF4 form is made once and kept in the cache directory; a checkpoint that bitsandbytes has quantised is used as
    it is, whatever the settings say. On the CPU, weights are mapped from the file, not copied, wherever their dtype is
    right. `on_progress` hears of quantisation only: when the cache has its result, there is none.

    Raises:
        ConfigurationError: the directory, the model's configuration or its tensors are not what can be served; CUDA is
            asked for and not there; or `max_model_len` is beyond the model's context.
    """
    config = ModelConfig.from_directory(directory)
    context = _served_context(config, settings.max_model_len)
    device = _resolve_device(settings.device)
    checkpoint = Checkpoint(directory)
    _check_names(checkpoint, config)
    if settings.quantization == "nf4" and not config.is_quantized:
        checkpoint = nf4_checkpoint(checkpoint, config, settings.cache_dir, settings.double_quant, device, on_progress)
    weights = _Loader(checkpoint, config, _DTYPES[settings.dtype], device).load()
    return Decoder(config, weights, context)


def _resolve_device(name: str) -> torch.device:
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


def _check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise where tensors are missing, or where there are some that the model would silently ignore."""
    expected = set(names.all_names(config))
    if missing := expected - checkpoint.names:
        raise ConfigurationError(f"{checkpoint.directory} lacks tensors of the model: {names.listed(missing)}.")
    quantised_parts = {part for name in expected for part in bnb_format.nf4_part_names(name, checkpoint.names)}
    unexpected = {name for name in checkpoint.names - expected - quantised_parts if not names.is_ignored(name, config)}
    if unexpected:
        raise ConfigurationError(
            f"{checkpoint.directory} has tensors that a {config.family} model of this config.json does not have: "
            f"{names.listed(unexpected)}."
        )


class _Loader:
    """Reads a checkpoint's tensors into a decoder's weights."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.device = device

    def load(self) -> DecoderWeights:
        """Everything, layer by layer."""
        tensors = self.checkpoint.read(names.outer_names(self.config))
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        embedding = self._dense(tensors, names.EMBEDDING, (vocab, hidden))
        tied = self.config.tie_word_embeddings
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(layer) for layer in range(self.config.num_layers)),
            norm=self._dense(tensors, names.FINAL_NORM, (hidden,)),
            head=embedding if tied else self._dense(tensors, names.HEAD, (vocab, hidden)),
        )

    def _layer(self, layer: int) -> LayerWeights:
        tensors = self._read_layer(layer)
        groups = {
            group.name: LinearGroup(
                linears=tuple(
                    self._linear(tensors, layer, projection, (width, group.in_features))
                    for projection, width in zip(group.projections, group.widths, strict=True)
                ),
                layer=layer,
                group=index,
            )
            for index, group in enumerate(self.config.projection_groups)
        }

        def norm(kind: str, size: int) -> Tensor:
            return self._dense(tensors, names.norm_name(layer, kind), (size,))

        hidden, head_dim, qk_norm = self.config.hidden_size, self.config.head_dim, self.config.qk_norm
        return LayerWeights(
            input_norm=norm("input_layernorm", hidden),
            qkv=groups["qkv"],
            q_norm=norm("q_norm", head_dim) if qk_norm else None,
            k_norm=norm("k_norm", head_dim) if qk_norm else None,
            o=groups["o"],
            post_attention_norm=norm("post_attention_layernorm", hidden),
            gate_up=groups["gate_up"],
            down=groups["down"],
        )

    def _read_layer(self, layer: int) -> dict[str, Tensor]:
        wanted = names.layer_names(self.config, layer)
        parts = [part for name in wanted for part in bnb_format.nf4_part_names(name, self.checkpoint.names)]
        return self.checkpoint.read(wanted + parts)

    def _linear(self, tensors: Mapping[str, Tensor], layer: int, projection: str, shape: tuple[int, int]) -> Linear:
        module = names.linear_names(self.config, layer)[projection]
        name = f"{module}.weight"
        has_bias = projection in self.config.biases
        bias = self._dense(tensors, f"{module}.bias", shape[:1]) if has_bias else None
        if not bnb_format.nf4_part_names(name, tensors):
            return Linear(self._dense(tensors, name, shape), bias)
        weight = bnb_format.from_tensors(name, tensors)
        self._check_shape(name, weight.shape, shape)
        return Linear(weight.to(self.device), bias)

    def _dense(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors[name]
        self._check_shape(name, tensor.shape, shape)
        return tensor.to(self.device, self.dtype)

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != expected:
            raise ConfigurationError(
                f"{self.checkpoint.directory}: {name} has the shape {list(found)}; config.json says {list(expected)}."
            )
