"""`tokenizer.json`, the format of the tokenizers library: what an adapter's has that the base's has not.

The model in it, vocabulary and merges, is nearly all of its bytes and of the time that it takes to load. Adapters add
tokens beside the model and leave it as it is, so theirs is kept without one and loaded with the base's, which both
share.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Model, WordLevel

from .errors import InvalidTokenizer, UnsupportedAdapter

TOKENIZER = "tokenizer.json"

PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""What is done to text before and after the model."""

_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass(frozen=True)
class TokenizerJson:
    """A file's parts, each written in one way only, so that two that mean the same are equal."""

    model: Mapping[str, Any] | None
    """Without options that are off; None where the base's is shared."""
    vocabulary: dict[str, int] = field(repr=False)
    """The model's tokens with their ids."""
    added_tokens: list[dict[str, Any]]
    """By their ids."""
    pipeline: Mapping[str, Any]
    """As the library writes it."""

    @cached_property
    def added_ids(self) -> dict[str, int]:
        """The added tokens with their ids."""
        return {token["content"]: token["id"] for token in self.added_tokens}

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """All tokens with their ids."""
        return self.vocabulary | self.added_ids

    def to_text(self) -> str:
        """The file; the same for equal parts."""
        content = {"version": "1.0", "added_tokens": self.added_tokens, **self.pipeline}
        model = {} if self.model is None else {"model": self.model}
        return json.dumps(content | model, sort_keys=True, ensure_ascii=False)


def parse_tokenizer_json(text: str) -> TokenizerJson:
    """A file's text to its parts; raises InvalidTokenizer for one that is not the tokenizers library's."""
    try:
        content = json.loads(text)
        model = _normalized_model(content["model"])
        tokens = [_normalized_token(token) for token in content["added_tokens"]]
        pipeline = {name: content.get(name) for name in PIPELINE}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InvalidTokenizer(f"{TOKENIZER} is not what the tokenizers library writes: {error!r}.") from error
    written = json.loads(_load({**pipeline, "added_tokens": [], "model": _EMPTY_MODEL}).to_str())
    return TokenizerJson(
        model,
        _vocabulary(model),
        sorted(tokens, key=lambda token: int(token["id"])),
        {name: written[name] for name in PIPELINE} | {"post_processor": _post_processor(written["post_processor"])},
    )


def own_tokens(brought: str, base: str, *, own_rows: Collection[int]) -> TokenizerJson | None:
    """What an adapter's file has of its own, without the model if the base's does; None if all is the base's.

    Args:
        own_rows: Ids for which the adapter has an embedding of its own, so that they may mean what they like.

    Raises:
        InvalidTokenizer: the tokenizers library does not load it, or numbers its tokens in another way.
        UnsupportedAdapter: a token of the base has another id, or none.
    """
    if brought == base:
        return None
    own, of_base = parse_tokenizer_json(brought), parse_tokenizer_json(base)
    if own == of_base:
        return None
    _require_ids_of(of_base, own, own_rows)
    if _can_share_model(own, of_base):
        own = replace(own, model=None)
    same_vocabulary = WordLevel(of_base.vocabulary, unk_token="")  # what gives ids to added tokens, without the merges
    _require_own_ids(own, load_own_tokens(own.to_text(), same_vocabulary))
    return own


def load_own_tokens(text: str, model: Model) -> Tokenizer:
    """The tokenizer of a file: with the file's model, or if it has none with `model`, which is shared.

    Raises:
        InvalidTokenizer: the library does not load it.
    """
    content = json.loads(text)
    if "model" in content:
        return _load(content)
    tokenizer = _load({**content, "added_tokens": [], "model": _EMPTY_MODEL})
    tokenizer.model = model
    tokens = [{name: value for name, value in token.items() if name != "id"} for token in content["added_tokens"]]
    tokenizer.add_tokens([AddedToken(**token) for token in tokens])  # in the order of their ids, which it gives anew
    return tokenizer


def with_model_of(base: str, own: str) -> str:
    """An adapter's file as it can be loaded by itself: with the base's model if it has none."""
    return json.dumps({"model": json.loads(base)["model"], **json.loads(own)}, ensure_ascii=False)


def _require_ids_of(base: TokenizerJson, own: TokenizerJson, own_rows: Collection[int]) -> None:
    """Refuse a file in which an id means another token than in the base, while its embedding is the base's."""
    ids = own.token_ids
    changed = base.vocabulary.items() - base.added_ids.items() - ids.items()
    if differing := [(token, token_id) for token, token_id in changed if token_id not in own_rows]:
        token, token_id = min(differing, key=lambda item: item[1])
        there = f"the id {ids[token]}" if token in ids else "no id"
        raise UnsupportedAdapter(
            f"{TOKENIZER} is not of this base: the token {token!r} has {there} in it, in the base {token_id}. An "
            "adapter may add tokens to the base's; to change those it needs embeddings of its own for them."
        )


def _can_share_model(own: TokenizerJson, base: TokenizerJson) -> bool:
    """Whether the base's model does the same as the file's, once the file's added tokens are added to it.

    Some files list added tokens in the model's vocabulary too, where they are never looked for: no difference.
    """
    models = [{name: value for name, value in (file.model or {}).items() if name != "vocab"} for file in (own, base)]
    return (
        models[0] == models[1]
        and base.vocabulary.items() <= own.token_ids.items()
        and own.vocabulary.items() <= (base.vocabulary | own.added_ids).items()
    )


def _require_own_ids(own: TokenizerJson, loaded: Tokenizer) -> None:
    """Refuse a file whose added tokens get other ids from the library, which ignores what the file says."""
    for token, token_id in own.added_ids.items():
        if (given := loaded.token_to_id(token)) != token_id:
            raise InvalidTokenizer(
                f"{TOKENIZER} gives the added token {token!r} the id {token_id}, but whoever loads it gets {given}: "
                "ids of added tokens follow the vocabulary without gaps."
            )


def _load(content: Mapping[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps({"version": "1.0", "truncation": None, "padding": None, **content}))
    except BaseException as error:  # the library raises bare Exceptions, and its panics are not even those
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InvalidTokenizer(f"{TOKENIZER} cannot be loaded by the tokenizers library: {error}.") from error


def _normalized_model(model: Mapping[str, Any]) -> dict[str, Any]:
    normalized = {name: value for name, value in model.items() if value not in (None, False, "")}
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        normalized["merges"] = [[left, right] for left, right in pairs]  # earlier versions wrote "left right"
    if "vocab" not in model:
        raise ValueError("the model has no vocab")
    return normalized


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's, with scores
        return {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
    return {str(token): int(token_id) for token, token_id in vocabulary.items()}


def _post_processor(processor: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What is left without those that add no token, as Transformers puts where there was none."""
    match processor:
        case {"type": "Sequence", "processors": parts}:
            left = [part for part in map(_post_processor, parts) if part]
            return {"type": "Sequence", "processors": left} if len(left) > 1 else next(iter(left), None)
        case {"type": "ByteLevel"}:  # it only says where in the text a token was
            return None
        case {"type": "TemplateProcessing", "special_tokens": tokens} if not tokens:
            return None
    return processor


def _normalized_token(token: Mapping[str, Any]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": int(token["id"]), "content": str(token["content"]), **{flag: bool(token.get(flag)) for flag in flags}}
