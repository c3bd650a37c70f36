"""The definition of a load: what is sent, when, and how often it is measured. Plain data; it knows no server."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

DEFAULT_CONCURRENCY = 16


def _split_at_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Integers = Annotated[tuple[PositiveInt, ...], BeforeValidator(_split_at_commas), Field(min_length=1)]
"""`8,16,32`."""

Words = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
"""`q_proj,v_proj`."""

Popularity = Literal["none", "same", "distinct", "zipf"]


class LoadTraits(BaseModel):
    """What is sent and how often it is measured: all that the loads of a comparison have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # what
    prompt_tokens: int = Field(64, ge=1, description="Tokens of each prompt.")
    output_tokens: int = Field(64, ge=1, description="Tokens to generate for each.")
    shared_prefix: int = Field(0, ge=0, description="How many of the prompt's tokens all requests have in common.")
    prompt_form: Literal["ids", "text"] = Field("ids", description="Prompts as token ids, or as words.")
    ignore_eos: bool = Field(True, description="Ask the server not to stop at the end-of-text token.")

    # for whom
    adapters: int = Field(16, ge=1, description="How many adapters are asked for.")
    zipf_alpha: float = Field(1.0, ge=0, description="Adapter k is asked for in proportion to k to the power -alpha.")

    # how often
    warm_up: int = Field(16, ge=0, description="Requests with short answers before the first run, not measured.")
    runs: int = Field(3, ge=1, description="Runs; medians over them are reported.")
    seed: int = Field(0, ge=0, description="Same seed, same requests.")

    @model_validator(mode="after")
    def _check_prefix(self) -> Self:
        if self.shared_prefix > self.prompt_tokens:
            raise ValueError("--shared-prefix cannot be longer than --prompt-tokens.")
        return self


class Load(LoadTraits):
    """One load. Two loads that are equal send the same requests, whatever the server."""

    concurrency: int | None = Field(
        None,
        ge=1,
        description=f"Requests in flight, each followed by the next; {DEFAULT_CONCURRENCY} unless --rate is given.",
    )
    rate: float | None = Field(None, gt=0, description="Requests per second, sent whether or not others are answered.")
    arrivals: Literal["poisson", "gamma"] = Field("poisson", description="How --rate spreads the requests.")
    burstiness: float = Field(1.0, gt=0, description="Shape of gamma arrivals: 1 is Poisson, less comes in bursts.")
    requests: int = Field(16, ge=1, description="Requests per run.")
    popularity: Popularity = Field(
        "distinct", description="Who gets a request: the base, the first adapter, each in turn, or by Zipf's law."
    )

    @property
    def num_adapters(self) -> int:
        """How many adapters the load needs: none if only the base is asked."""
        return 0 if self.popularity == "none" else self.adapters

    @model_validator(mode="before")
    @classmethod
    def _close_the_loop(cls, data: Any) -> Any:
        """Without a rate there is a concurrency, which the results then name."""
        if isinstance(data, dict) and data.get("rate") is None and data.get("concurrency") is None:
            return {**data, "concurrency": DEFAULT_CONCURRENCY}
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("--rate sends without waiting for answers and --concurrency waits for them: give one.")
        if self.burstiness != 1 and (self.rate is None or self.arrivals != "gamma"):
            raise ValueError("--burstiness is the shape of --arrivals gamma, which needs a --rate.")
        return self


class Sweep(BaseModel):
    """What `onebase bench scale` varies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    counts: Integers = Field((1, 5, 50, 500, 2000), description="Numbers of adapters to measure with.")


class ClosedLoop(BaseModel):
    """`16:distinct`: how many requests are in flight, and to whom they go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: PositiveInt
    popularity: Popularity

    @model_validator(mode="before")
    @classmethod
    def _split_at_colon(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        concurrency, _, popularity = data.strip().partition(":")
        return {"concurrency": concurrency, "popularity": popularity}

    def __str__(self) -> str:
        return f"{self.concurrency}:{self.popularity}"


class ComparedLoads(BaseModel):
    """What `onebase bench compare` puts each server under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loads: Annotated[tuple[ClosedLoop, ...], BeforeValidator(_split_at_commas), Field(min_length=1)] = Field(
        tuple(map(ClosedLoop.model_validate, ("16:distinct", "16:same", "16:none", "1:same", "1:none"))),
        description="Loads as CONCURRENCY:POPULARITY, the latter none, same, distinct or zipf as in `onebase bench`.",
    )
    requests_per_stream: int = Field(2, ge=1, description="Requests per run, as a multiple of the concurrency.")
    # vLLM's queues busy-wait for a second after their last message, OpenMP's threads for a fifth of one
    settle: float = Field(1.5, ge=0, description="Seconds before each run, until the last server stops spinning.")

    def with_traits(self, traits: LoadTraits) -> list[Load]:
        """The loads in full."""
        return [
            Load(
                **traits.model_dump(),
                concurrency=loop.concurrency,
                popularity=loop.popularity,
                requests=loop.concurrency * self.requests_per_stream,
            )
            for loop in self.loads
        ]
