"""What `config.json` says of a checkpoint's quantisation. It needs no torch and looks at no tensor."""

from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import HfConfig


def quantization_of(hf: HfConfig) -> str | None:
    """How the linears are quantised: `nf4`, `fp4`, `int4` or `int8`; None where they are not.

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
    if method == "bitsandbytes" and is_8bit:
        return "int8"
    if method == "bitsandbytes" and is_4bit:
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        if kind in ("nf4", "fp4"):
            return kind
        method += f" 4-bit {kind}"
    raise ConfigurationError(
        f"config.json: the checkpoint is quantised with {method}, which is not carried. "
        "Use the unquantised checkpoint, or one quantised by bitsandbytes to nf4, fp4 or int8."
    )
