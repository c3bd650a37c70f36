"""What `onebase bench kernels` is told: shapes, rows, ops and how often. Plain data; it needs no torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from onebase_server.bench.load import Integers
from onebase_server.model.config import ModelConfig
from onebase_server.model.config_reader import HfConfig
from onebase_server.settings import AdapterQuantizationName, KernelsName

PresetName = Literal["8b", "70b"]

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
PRESETS: dict[PresetName, HfConfig] = {
    "8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""`config.json` of Llama 3 (arXiv 2407.21783, table 3), as far as shapes go."""


class KernelOptions(BaseModel):
    """Exactly one of `demo`, `base` and `shape` says whose shapes are timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # what is computed
    demo: bool = Field(False, description="The shapes of the demo base.")
    base: Path | None = Field(None, description="The shapes of this base: a directory with a config.json.")
    shape: PresetName | None = Field(None, description="The shapes of a Llama 3 of this size.")
    ops: tuple[str, ...] = Field((), description="Time these ops only.")
    rows: Integers = Field((1, 2, 4, 8, 16, 32, 64, 128, 256), description="Tokens of the step.")
    adapters: int = Field(16, ge=1, description="Adapters among the rows of the side path.")
    ranks: Integers = Field((8, 16, 32, 64), description="Their ranks, in turn.")
    adapter_quantization: AdapterQuantizationName = Field("none", description="How their A and B are kept.")
    context: PositiveInt = Field(512, description="Tokens in the KV cache of each request.")

    # by whom
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute.")
    kernels: KernelsName = Field("auto", description="The back end that is timed against the others.")
    threads: int | None = Field(None, ge=1, description="CPU threads; by default all cores.")

    # how often
    tune: bool = Field(
        False, description="Instead find out how the Triton product with NF4 is best cut, and write a plan file."
    )
    repeats: int = Field(7, ge=1, description="Measurements of each op; medians over them are reported.")
    seed: int = Field(0, ge=0, description="Of the random operands.")

    @field_validator("ops", mode="before")
    @classmethod
    def _split_at_commas(cls, ops: Any) -> Any:
        return ops.split(",") if isinstance(ops, str) else ops

    @model_validator(mode="after")
    def _check_one_is_chosen(self) -> Self:
        if [self.demo, self.base is not None, self.shape is not None].count(True) != 1:
            raise ValueError("Say whose shapes: --demo, --base or --shape.")
        return self


def read_config(options: KernelOptions) -> ModelConfig:
    """The config whose shapes are timed; the demo base is fetched if it is not there yet.

    Raises:
        ConfigurationError: `base` is not a directory of a carried family.
    """
    if options.shape is not None:
        return ModelConfig.from_hf(PRESETS[options.shape])
    if options.base is not None:
        return ModelConfig.from_directory(options.base)
    from onebase_server.demo import prepare_demo  # here, for it is needed with --demo only

    return ModelConfig.from_directory(prepare_demo().base)
