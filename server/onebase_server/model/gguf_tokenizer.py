"""From a GGUF's vocabulary to a `tokenizers` tokenizer whose ids are llama.cpp's.

Two kinds of vocabulary exist in Llama files: `gpt2`, byte-level BPE with the merges listed and the way text is cut into
words named by `tokenizer.ggml.pre`; and `llama`, SentencePiece BPE with a score per token and no words at all.
"""

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from onebase_server.errors import ConfigurationError
from onebase_server.model.gguf_config import EOS_KEYS
from onebase_server.model.gguf_metadata import GgufMetadata

# How text is cut into words before merging: each pattern in turn cuts the pieces that the one before it left.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_SINGLE_DIGITS = r"\p{N}"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

_WORD_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (_PUNCTUATION, _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_WORDS,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (_SINGLE_DIGITS, _GPT2_WORDS)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3_WORDS,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2_WORDS,)),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3"}
"""A word that is a token is taken as it is, unmerged; these also begin with BOS unless the file says otherwise."""

_SPACE = "▁"  # how SentencePiece writes a space
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def build_tokenizer(metadata: GgufMetadata) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises:
        ConfigurationError: The vocabulary's kind or the way it cuts words is not known; the text names it.
    """
    kind = metadata.require("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise ConfigurationError(
            f"{metadata.path} has a tokenizer of the kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) can be imported."
        )
    tokenizer.add_tokens(_added_tokens(metadata))
    if (post_processor := _post_processor(metadata)) is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def tokenizer_config(metadata: GgufMetadata) -> dict[str, Any]:
    """The fields of `tokenizer_config.json`, with the chat template if the file has one."""
    tokens = metadata.require("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "add_bos_token": _adds_bos(metadata),
        "add_eos_token": _adds_eos(metadata),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.architecture}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, key in _SPECIAL_TOKENS.items():
        if (token_id := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            config[name] = tokens[token_id]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _byte_level_bpe(metadata: GgufMetadata) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _WORD_PATTERNS:
        raise ConfigurationError(
            f"{metadata.path} cuts text into words as {name!r} (tokenizer.ggml.pre) does, which is not known here; "
            f"known are {', '.join(sorted(_WORD_PATTERNS))}."
        )
    merges = [_split_merge(merge) for merge in metadata.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(_vocab(metadata), merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _WORD_PATTERNS[name]]
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece_bpe(metadata: GgufMetadata) -> Tokenizer:
    """SentencePiece merges the neighbours whose union scores best; as BPE that is a merge for every such pair."""
    tokens: list[str] = metadata.require("tokenizer.ggml.tokens")
    scores: list[float] = metadata.require("tokenizer.ggml.scores")
    vocab = _vocab(metadata)
    merges = [
        (scores[token_id], token[:cut], token[cut:])
        for token_id, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[0])
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [(left, right) for _, left, right in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if add_prefix else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return tokenizer


def _vocab(metadata: GgufMetadata) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(metadata.require("tokenizer.ggml.tokens"))}


def _added_tokens(metadata: GgufMetadata) -> list[AddedToken]:
    """Tokens found in text before anything else: control tokens, hidden from output, and those the user defined."""
    tokens = metadata.require("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    named = {metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", *EOS_KEYS)}
    hidden = {
        token_id
        for token_id, kind in enumerate(types)
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token_id in named
    }
    return [
        AddedToken(token, special=token_id in hidden, normalized=False)
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token_id in hidden or kind == TokenType.USER_DEFINED
    ]


def _adds_bos(metadata: GgufMetadata) -> bool:
    by_default = (
        metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def _adds_eos(metadata: GgufMetadata) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_eos_token", False))


def _post_processor(metadata: GgufMetadata) -> processors.TemplateProcessing | None:
    """Puts BOS before and EOS behind where the file asks for it."""
    tokens = metadata.require("tokenizer.ggml.tokens")
    wanted = {"bos": _adds_bos(metadata), "eos": _adds_eos(metadata)}
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, wants in wanted.items() if wants}
    ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    if not ids:
        return None
    before = [tokens[ids["bos"]]] if "bos" in ids else []
    behind = [tokens[ids["eos"]]] if "eos" in ids else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        special_tokens=[(tokens[token_id], token_id) for token_id in ids.values()],
    )
