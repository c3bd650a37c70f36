"""The tokenizer files beside an adapter, checked, and what is left of them once the base's are taken away.

Trainers save the tokenizer with each adapter, mostly the base's unchanged; of that nothing is left.
"""

from collections.abc import Mapping
from pathlib import Path

from .adapter import Adapter
from .base_layout import BaseLayout
from .errors import InvalidTokenizer, StoreError, UnsupportedAdapter
from .template_sandbox import InvalidTemplate, compile_template
from .tokenizer_files import CONFIG, read_declared_ids, read_tokenizer_files
from .tokenizer_form import TokenizerForm
from .tokenizer_json import TOKENIZER, TokenizerJson, own_tokens, parse_tokenizer_json


def read_own_tokenizer(
    directory: Path, adapter: Adapter, layout: BaseLayout, base: TokenizerForm
) -> TokenizerForm | None:
    """What the adapter in `directory` brings of its own; None if all is the base's.

    Raises:
        InvalidTokenizer: a file, which the text names, is not what it should be.
        UnsupportedAdapter: its tokens are not the base's, or one of them has no embedding.
        StoreError: there is nothing to compare its tokens with.
    """
    brought = read_tokenizer_files(directory)
    special_tokens = None if _are_alike(brought.special_tokens, base.special_tokens) else brought.special_tokens
    chat_template = None if _are_same_template(brought.chat_template, base.chat_template) else brought.chat_template
    if chat_template is not None:
        _check_template(chat_template)
    tokens = None
    if brought.tokens is not None:
        tokens = own_tokens(brought.tokens, _base_file(base), own_rows=_own_rows(adapter))
    if tokens is not None:
        _require_embeddings(tokens, adapter.vocab_size or layout.vocab_size)
    if tokens is not None or brought.tokens is None:
        _check_declared_ids(read_declared_ids(directory), tokens, base)
    if special_tokens is not None:
        _check_end_token(special_tokens, tokens, base)
    own = TokenizerForm(None if tokens is None else tokens.to_text(), special_tokens, chat_template)
    return own if own.parts else None


def _base_file(base: TokenizerForm) -> str:
    if base.tokens is None:
        raise StoreError(f"The base has no {TOKENIZER} to compare the adapter's tokens with.")
    return base.tokens


def _ids(tokens: TokenizerJson | None, base: TokenizerForm) -> Mapping[str, int]:
    """Of all tokens that requests for the adapter can have."""
    return (tokens or parse_tokenizer_json(_base_file(base))).token_ids


def _own_rows(adapter: Adapter) -> frozenset[int]:
    """Ids of the tokens whose embedding is the adapter's."""
    rows = adapter.vocabulary.embedding.rows if adapter.vocabulary else None
    return frozenset() if rows is None else frozenset(rows.tokens.tolist())


def _require_embeddings(tokens: TokenizerJson, vocab_size: int | None) -> None:
    """Refuse tokens beyond the embedding's rows, of which there are more than the base has tokens if it was padded."""
    token, token_id = max(tokens.token_ids.items(), key=lambda item: item[1])
    if vocab_size is not None and token_id >= vocab_size:
        raise UnsupportedAdapter(
            f"{TOKENIZER} gives the token {token!r} the id {token_id}, but there are embeddings for {vocab_size} "
            "tokens only: save the adapter with the embeddings that were trained for what it adds (PEFT's "
            "save_embedding_layers=True, or modules_to_save)."
        )


def _check_declared_ids(declared: Mapping[str, int], tokens: TokenizerJson | None, base: TokenizerForm) -> None:
    """Refuse files that disagree: an old tokenizer, for instance, whose tokens were never written to the new format."""
    if not declared:
        return
    ids = _ids(tokens, base)
    for token, token_id in declared.items():
        if ids.get(token) != token_id:
            where = TOKENIZER if tokens else f"the base's {TOKENIZER}, and the adapter brings none"
            raise InvalidTokenizer(
                f"The tokenizer's files give the token {token!r} the id {token_id}, which it has not in {where}; save "
                "the tokenizer in its fast form (AutoTokenizer's save_pretrained)."
            )


def _check_end_token(special_tokens: Mapping[str, str], tokens: TokenizerJson | None, base: TokenizerForm) -> None:
    end = special_tokens.get("eos_token")
    if end is not None and end not in _ids(tokens, base):
        raise InvalidTokenizer(f"{CONFIG}: the eos_token {end!r} is not a token of the tokenizer.")


def _are_alike(brought: Mapping[str, str] | None, base: Mapping[str, str] | None) -> bool:
    """Whether two maps of special tokens say the same of prompts and answers, in which there is no padding."""
    return _without_padding(brought) == _without_padding(base)


def _without_padding(tokens: Mapping[str, str] | None) -> dict[str, str]:
    return {name: text for name, text in (tokens or {}).items() if name != "pad_token"}


def _are_same_template(brought: str | None, base: str | None) -> bool:
    return brought is not None and base is not None and _as_jinja_reads(brought) == _as_jinja_reads(base)


def _as_jinja_reads(template: str) -> str:
    return template.replace("\r\n", "\n").removesuffix("\n")


def _check_template(source: str) -> None:
    try:
        compile_template(source)
    except InvalidTemplate as error:
        raise InvalidTokenizer(f"The chat template is not valid: {error}.") from error
