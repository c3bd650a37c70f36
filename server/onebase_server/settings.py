"""One frozen, validated `Settings`: flags > environment (`ONEBASE_*`) > `onebase.toml` > the defaults below.

A leaf: it imports nothing of the project but its errors.
"""

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

QuantizationName = Literal["nf4", "fp4", "int4", "int8", "none"]
"""How the linears of an unquantised checkpoint are kept."""

AdapterQuantizationName = Literal["none", "int8"]
"""How the matrices of low-rank adapters are kept on the device."""

KernelsName = Literal["auto", "cpu", "triton", "bitsandbytes", "reference"]
"""A back end of onebase_kernels, or the fastest that can run."""


class EngineSettings(BaseModel):
    """What the engine process needs to know; no secrets, no addresses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(description="Base model: a local Hugging Face directory, or a hub id.")
    cache_dir: Path = Field(
        Path.home() / ".cache" / "onebase", description="Where quantised weights and downloads are kept."
    )

    # how to compute
    quantization: QuantizationName = Field("nf4", description="How the base's linears are kept.")
    double_quant: bool = Field(
        True, description="With nf4 and fp4: quantise the block scales too (4.127 bits a parameter)."
    )
    group_size: int = Field(
        64, description="With int4: how many inputs share a scale and a minimum, 32, 64 or 128 (4.75 bits a parameter)."
    )
    adapter_quantization: AdapterQuantizationName = Field(
        "none",
        description="How adapters' A and B are kept on the device: in the compute dtype, or in 8 bits with a scale for "
        "each rank, half as large.",
    )
    quantize_head: bool = Field(False, description="Keep the output head in NF4 too: less to read, coarser logits.")
    screen_head: bool = Field(
        True,
        description="Find greedy tokens by an 8-bit copy of the output head, on CPUs with products of bfloat16: the "
        "same ones, half the reading.",
    )
    dtype: Literal["bfloat16", "float32", "float16"] = Field("bfloat16", description="Compute and KV dtype.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute.")
    kernels: KernelsName = Field("auto", description="Which kernels compute; `auto` takes the fastest that can run.")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine; by default all cores.")

    # how much to hold
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt and answer together, in tokens.")
    max_num_seqs: int = Field(64, ge=1, description="Most requests in one step.")
    max_num_batched_tokens: int = Field(512, ge=1, description="Most tokens in one step (prefill is chunked).")
    block_size: int = Field(16, ge=1, description="Tokens in a block of the KV cache.")
    kv_cache_memory: ByteSize = Field(ByteSize(512 << 20), ge=1, description="Bytes of the KV cache.")
    prefix_cache: bool = Field(True, description="Reuse the KV blocks of prompts that start alike.")
    adapter_memory: ByteSize = Field(ByteSize(256 << 20), ge=1, description="Bytes of adapters on the device.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What to log.")

    @field_validator("group_size")
    @classmethod
    def _refuse_other_groups(cls, value: int) -> int:
        if value not in (32, 64, 128):
            raise ValueError(f"groups have 32, 64 or 128 inputs, not {value}")
        return value


class Settings(BaseSettings, EngineSettings):
    """Everything that `onebase serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix="ONEBASE_", env_ignore_empty=True, toml_file="onebase.toml", frozen=True, extra="forbid"
    )

    # what to serve
    revision: str | None = Field(None, description="Hub revision (a commit hash pins it) when `base` is a hub id.")
    base_name: str | None = Field(None, description="The base's name in the API; by default its directory's.")
    store: Path = Field(Path("adapters"), description="Directory of the adapter store.")

    # where to serve
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    insecure: bool = Field(False, description="Allow other hosts in although a key is missing.")
    api_key: SecretStr | None = Field(None, min_length=1, description="Key for generation; set it as ONEBASE_API_KEY.")
    admin_key: SecretStr | None = Field(
        None, min_length=1, description="Key for adapters; set it as ONEBASE_ADMIN_KEY."
    )
    allow_local_paths: Path | None = Field(
        None, description="The one folder that /v1/load_lora_adapter may read; off by default."
    )

    # how much to accept
    max_waiting: int = Field(1024, ge=1, description="Most requests waiting; more are answered 503.")
    max_lora_rank: int = Field(256, ge=1, description="Largest rank that an upload may have.")
    max_upload_bytes: ByteSize = Field(
        ByteSize(1 << 30), ge=1, description="Largest upload, and largest unpacked archive."
    )
    adapter_metric_labels: int = Field(
        50, ge=0, description="How many adapters have metrics of their own; the rest count as `other`."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags first, then the environment, then onebase.toml in the working directory."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @model_validator(mode="after")
    def _refuse_open_doors(self) -> "Settings":
        if not self.insecure and not self.is_loopback and not (self.api_key and self.admin_key):
            missing = " and ".join(
                name
                for name, key in (("ONEBASE_API_KEY", self.api_key), ("ONEBASE_ADMIN_KEY", self.admin_key))
                if not key
            )
            raise ValueError(
                f"refusing to listen on {self.host} without {missing}: anyone who reaches the port could use it. "
                "Set the key, listen on 127.0.0.1, or pass --insecure."
            )
        return self

    @property
    def served_name(self) -> str:
        """The base's name in the API: `base_name`, or the last part of where it lies."""
        return self.base_name or Path(self.base).absolute().name

    @property
    def engine(self) -> EngineSettings:
        """The part that the engine process gets."""
        return EngineSettings.model_validate(self.model_dump(include=set(EngineSettings.model_fields)))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
