"""What clients may send: OpenAI's fields that this server carries, and vLLM's extensions to them.

A field that is not carried is refused by name, never ignored, unless its value cannot change the answer. This module
knows no tokens and no engine: what depends on the model is checked in `generation`.
"""

from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from onebase_server.errors import BadRequest

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_COMBINED_ADAPTERS = 16

# Fields of OpenAI and vLLM that never change the text, whatever their value.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
# Fields that are not carried, and the values of them that ask for nothing. A null asks for nothing in any field.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}


def _refuse_lone_surrogates(text: str) -> str:
    """JSON can escape half of a UTF-16 pair, which is no character: neither the tokenizer nor UTF-8 has it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must be text, but character {error.start} is half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_refuse_lone_surrogates)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]],
    BeforeValidator(_as_list),
    Field(max_length=MAX_STOP_STRINGS),
]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Prompt = str | list[int]


def _as_prompts(value: object) -> list[Prompt]:
    """The four shapes of a prompt as one. By hand: a union's errors would name each shape that was not meant."""
    if isinstance(value, str) or _is_token_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not _is_token_ids(prompt):
            raise ValueError(f"must hold texts or lists of token ids, and item {index} is neither")
        if isinstance(prompt, str):
            _refuse_lone_surrogates(prompt)
    return value


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(token_id) is int for token_id in value)


Prompts = Annotated[
    list[Prompt], PlainValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class ApiModel(BaseModel):
    """A JSON object that refuses fields it does not have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(ApiModel):
    """What to add to a stream."""

    include_usage: bool = Field(False, description="Send a last chunk without choices that holds the token counts.")
    include_obfuscation: bool = Field(False, description="Accepted for OpenAI's clients; nothing is ever padded.")


class WeightedName(ApiModel):
    """One adapter of a combination."""

    name: Text = Field(description="An adapter, or `adapter@version`.")
    weight: float = Field(1.0, ge=-100, le=100, description="What its update is multiplied by.")


class GenerationRequest(ApiModel):
    """What completions and chat completions have in common; `null` anywhere means the default."""

    model: Text = Field(description="The base, an adapter, `base:adapter`, or `adapter@version`.")
    adapter: list[WeightedName] = Field(
        [],
        max_length=MAX_COMBINED_ADAPTERS,
        description="Onebase: run on the weighted sum of these; `model` is the base.",
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63 - MAX_CHOICES, description="Same seed, same text; choice i takes seed + i."
    )
    stop: StopStrings = Field([], description="Texts that end the answer; they are not part of it.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None

    top_k: int = Field(0, ge=-1, lt=2**63, description="vLLM: keep the k most likely tokens; 0 or -1 is off.")
    min_p: float = Field(0.0, ge=0, le=1, description="vLLM: least share of the likeliest token's probability.")
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="vLLM: above 1 discourages tokens seen before.")
    stop_token_ids: list[TokenId] = Field([], max_length=256, description="vLLM: tokens that end the answer.")
    include_stop_str_in_output: bool = Field(False, description="vLLM: keep what ended the answer in its text.")
    ignore_eos: bool = Field(False, description="vLLM: do not stop at the end-of-text token.")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {field: value for field, value in data.items() if not _asks_for_nothing(field, value)}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is only allowed together with stream=true.", param="stream_options")
        return self


def _asks_for_nothing(field: str, value: object) -> bool:
    return value is None or field in IGNORED_FIELDS or value in NEUTRAL_VALUES.get(field, ())


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompts = Field(description="A text, a list of texts, token ids, or a list of lists of them.")
    max_tokens: int | None = Field(None, ge=0, description="Most tokens to generate, 16 by default; 0 with `echo`.")
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Alternatives to report per token.")
    add_special_tokens: bool = Field(True, description="vLLM: let the tokenizer add a begin-of-text token.")

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens=0 is only allowed together with echo=true.", param="max_tokens")
        return self


class TextPart(ApiModel):
    """A part of a message's content; only text is carried."""

    type: Literal["text"]
    text: Text


def _text_of(content: object) -> object:
    """Text parts joined into one text; anything else is left for the field's own check."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"must be text: a part of type {kind!r} is not supported")
    return "".join(TextPart.model_validate(part).text for part in content)


class ChatMessage(ApiModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart])]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """An assistant's message sent back carries `refusal: null`, `tool_calls: []` and the like."""
        if not isinstance(data, dict):
            return data
        return {field: value for field, value in data.items() if field in cls.model_fields or value not in (None, [])}

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it; `developer` is OpenAI's newer word for `system`."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; by default what the context leaves."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool = Field(False, description="Report each token's log-probability.")
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS, description="Alternatives to report per token.")

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs is only allowed together with logprobs=true.", param="top_logprobs")
        return self


class LoadLoraAdapter(ApiModel):
    """`POST /v1/load_lora_adapter`, as vLLM takes it."""

    lora_name: Text
    lora_path: Text = Field(description="A PEFT directory inside the folder given as --allow-local-paths.")
    load_inplace: bool = Field(False, description="Replace an adapter of the same name by a new version.")


class UnloadLoraAdapter(ApiModel):
    """`POST /v1/unload_lora_adapter`, as vLLM takes it."""

    lora_name: Text
    lora_int_id: int | None = Field(None, description="Accepted for vLLM's clients; the name decides.")


class RollbackRequest(ApiModel):
    """`POST /v1/adapters/{name}/rollback`."""

    version: int | None = Field(None, ge=1, description="The version to make live; by default the one before.")
