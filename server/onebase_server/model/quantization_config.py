"""What `config.json` says of a checkpoint's quantisation. It needs no torch and looks at no tensor."""

from typing import Literal

from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import ConfigReader, HfConfig

PackedInt4 = Literal["gptq", "gptq_v2", "awq"]
"""How the tools of GPTQ (arXiv 2210.17323) and AWQ (2306.00978) pack 4-bit integers (`packed_int4_format`)."""


def quantization_of(hf: HfConfig) -> str | None:
    """How the linears are quantised: `nf4`, `fp4`, `int4`, `int8` or a `PackedInt4`; None where they are not.

    Raises:
        ConfigurationError: they are, in a way that is not carried.
    """
    found = hf.get("quantization_config") or hf.get("compression_config")
    if not found:
        return None
    is_4bit, is_8bit = found.get("load_in_4bit"), found.get("load_in_8bit")
    method = found.get("quant_method", "bitsandbytes" if is_4bit or is_8bit else "unknown")
    if method == "onebase_int4":
        return "int4"
    if method in ("gptq", "awq"):
        return _packed_int4(found)
    if method == "bitsandbytes" and is_8bit:
        return "int8"
    if method == "bitsandbytes" and is_4bit:
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        if kind in ("nf4", "fp4"):
            return kind
        method += f" 4-bit {kind}"
    raise ConfigurationError(
        f"config.json: the checkpoint is quantised with {method}, which is not carried. "
        "Use the unquantised checkpoint, or one quantised by bitsandbytes (nf4, fp4, int8), GPTQ or AWQ (4 bits)."
    )


def _packed_int4(found: HfConfig) -> PackedInt4:
    """What GPTQ's or AWQ's tools wrote; raises ConfigurationError, naming the option, where that is not read."""
    reader = ConfigReader(found)
    for option in ("bits", "w_bit"):
        reader.refuse_unless(option, 4)
    reader.refuse_unless("lm_head", False)
    if found["quant_method"] == "gptq":
        reader.refuse_unless("is_marlin_format", False)
        if found.get("checkpoint_format") == "gptq_v2":
            return "gptq_v2"
        reader.refuse_unless("checkpoint_format", "gptq")
        return "gptq"
    reader.refuse_unless("zero_point", True)
    for option in ("version", "format"):
        if str(found.get(option)).lower() != "gemm":
            reader.refuse_unless(option, "gemm")
    if found.get("backend") == "llm-awq":
        reader.refuse_unless("backend", "autoawq")
    return "awq"
