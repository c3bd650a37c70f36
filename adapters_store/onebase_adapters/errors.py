"""The ways an adapter can be wrong: each error's text is a sentence for the person who reads it."""

from typing import ClassVar

# The tree of errors; `status` is the HTTP status that suits each, `code` its word in the API's error envelope.
#
#   AdapterError 400
#   ├── InvalidUpload 422          what was sent cannot become an adapter
#   │   ├── InvalidArchive 400     not an archive, a path that leaves it, a link, a bomb
#   │   ├── UploadTooLarge 413     more bytes or files than allowed
#   │   ├── InvalidConfig 422      adapter_config.json is not what PEFT writes
#   │   ├── UnsupportedAdapter 422 a PEFT type or option that this server does not carry
#   │   ├── InvalidTensors 422     not safetensors, truncated, NaN, wrong shapes or dtypes, nothing matched
#   │   ├── InvalidTokenizer 422   a tokenizer file or chat template that cannot be read
#   │   ├── RankTooLarge 422
#   │   ├── InvalidName 422
#   │   └── DigestMismatch 422
#   ├── InvalidMerge 422           adapters that cannot be merged as asked; on the command line only
#   ├── AdapterNotFound 404        no such name
#   ├── VersionNotFound 404        the name exists, that version does not
#   └── StoreError 500             the store itself is damaged or belongs to another base


class AdapterError(Exception):
    """Root of everything that can be wrong with an adapter; its text is a sentence for the person who reads it."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "adapter_error"


class InvalidUpload(AdapterError):
    """What was sent cannot become an adapter of this base."""

    status = 422
    code = "invalid_adapter"


class InvalidArchive(InvalidUpload):
    """The archive cannot be read, or holds a path that leaves it, a link or a bomb."""

    status = 400
    code = "invalid_archive"


class UploadTooLarge(InvalidUpload):
    """The upload has more bytes or more files than the limits allow."""

    status = 413
    code = "upload_too_large"


class InvalidConfig(InvalidUpload):
    """`adapter_config.json` is missing, is not JSON, or a field of it makes no sense."""

    code = "invalid_adapter_config"


class UnsupportedAdapter(InvalidUpload):
    """A PEFT type or option that this server does not carry; the text names it."""

    code = "unsupported_adapter"


class InvalidTensors(InvalidUpload):
    """The tensors are not safetensors, truncated, not finite, of a wrong shape or dtype, or match no linear."""

    code = "invalid_adapter_tensors"


class InvalidTokenizer(InvalidUpload):
    """A tokenizer file, or the chat template, is not what it should be."""

    code = "invalid_adapter_tokenizer"


class RankTooLarge(InvalidUpload):
    """A pair's rank is over the server's limit."""

    code = "rank_too_large"


class InvalidName(InvalidUpload):
    """The adapter's name is not `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`."""

    code = "invalid_adapter_name"


class DigestMismatch(InvalidUpload):
    """The bytes that arrived are not those whose sha256 the sender announced."""

    code = "digest_mismatch"


class InvalidMerge(AdapterError):
    """Adapters cannot be merged in the way that was asked for."""

    status = 422
    code = "invalid_merge"


class AdapterNotFound(AdapterError):
    """No adapter of that name is published."""

    status = 404
    code = "adapter_not_found"


class VersionNotFound(AdapterError):
    """The adapter exists, but has no such version."""

    status = 404
    code = "adapter_version_not_found"


class StoreError(AdapterError):
    """The store on disk is damaged, or belongs to another base."""

    status = 500
    code = "store_error"
