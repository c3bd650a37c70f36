import asyncio

import pytest
from openai import BadRequestError, InternalServerError, NotFoundError

BASE = "tiny"
GREEDY = {"model": BASE, "temperature": 0, "extra_body": {"ignore_eos": True}}


async def collect(stream) -> dict[int, str]:
    """The texts of a stream, by choice."""
    texts: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


async def test_the_answer_is_the_objects_that_openai_sends(openai):
    completion = await openai.completions.create(prompt="Once upon", max_tokens=5, **GREEDY)
    assert completion.object == "text_completion"
    assert completion.model == BASE
    assert len(completion.choices[0].text) == 5
    assert completion.choices[0].finish_reason == "length"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        9,
        5,
        14,
    )


async def test_without_max_tokens_sixteen_are_generated(openai):
    completion = await openai.completions.create(prompt="Once", **GREEDY)
    assert completion.usage.completion_tokens == 16


async def test_the_four_shapes_of_a_prompt_mean_the_same(openai, server):
    token_ids = server.context.tokenizers.base.encode("Hello")
    texts = []
    for prompt in ("Hello", ["Hello"], token_ids, [token_ids]):
        completion = await openai.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        texts.append(completion.choices[0].text)
    assert len(set(texts)) == 1


async def test_several_prompts_are_answered_in_their_order_and_as_each_alone(openai):
    prompts = ["One", "Two words", "Three"]
    alone = [
        (await openai.completions.create(prompt=prompt, max_tokens=8, **GREEDY)).choices[0].text for prompt in prompts
    ]
    together = await openai.completions.create(prompt=prompts, max_tokens=8, **GREEDY)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]


async def test_a_stream_holds_the_same_text_as_the_whole_answer(openai):
    arguments = {"prompt": ["One", "Two"], "max_tokens": 20, "n": 2, "seed": 3, "model": BASE}
    whole = await openai.completions.create(**arguments)
    streamed = await collect(await openai.completions.create(stream=True, **arguments))
    assert streamed == {choice.index: choice.text for choice in whole.choices}


async def test_choices_of_one_seed_differ_and_can_be_had_again(openai):
    arguments = {"prompt": "Seed", "max_tokens": 16, "n": 3, "seed": 7, "model": BASE}
    first, second = [await openai.completions.create(**arguments) for _ in range(2)]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    third = await openai.completions.create(**(arguments | {"n": 1, "seed": 9}))
    assert third.choices[0].text == texts[2]


async def test_a_stop_string_over_several_tokens_cuts_the_text_and_ends_the_generation(openai):
    text = (await openai.completions.create(prompt="Stop", max_tokens=40, **GREEDY)).choices[0].text
    stop = text[10:14]
    expected = text[: text.index(stop)]
    whole = await openai.completions.create(prompt="Stop", max_tokens=40, stop=["never", stop], **GREEDY)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(expected) + len(stop)
    stream = await openai.completions.create(prompt="Stop", max_tokens=40, stop=stop, stream=True, **GREEDY)
    assert await collect(stream) == {0: expected}


async def test_the_stop_string_is_kept_if_asked_for(openai):
    text = (await openai.completions.create(prompt="Stop", max_tokens=40, **GREEDY)).choices[0].text
    extra = {"ignore_eos": True, "include_stop_str_in_output": True}
    kept = await openai.completions.create(
        model=BASE, temperature=0, prompt="Stop", max_tokens=40, stop=text[10:14], extra_body=extra
    )
    assert kept.choices[0].text == text[: text.index(text[10:14]) + 4]


async def test_a_stop_token_ends_the_text_before_it(openai, server):
    text = (await openai.completions.create(prompt="Stop", max_tokens=40, **GREEDY)).choices[0].text
    (token_id,) = server.context.tokenizers.base.encode(text[10])
    stopped = await openai.completions.create(
        model=BASE, temperature=0, prompt="Stop", max_tokens=40, extra_body={"stop_token_ids": [token_id]}
    )
    assert stopped.choices[0].text == text[: text.index(text[10])]
    assert stopped.choices[0].finish_reason == "stop"


async def test_logprobs_have_an_entry_per_token_with_alternatives_and_offsets(openai):
    completion = await openai.completions.create(prompt="Log", max_tokens=6, logprobs=3, **GREEDY)
    choice = completion.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(6))
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())  # greedy takes the likeliest


async def test_echo_repeats_the_prompt_and_its_logprobs(openai):
    completion = await openai.completions.create(prompt="Echo", max_tokens=3, echo=True, logprobs=1, **GREEDY)
    choice = completion.choices[0]
    assert choice.text.startswith("Echo")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == list(range(7))


async def test_echo_without_new_tokens_scores_the_prompt_alone(openai):
    scored = await openai.completions.create(prompt="Echo", max_tokens=0, echo=True, logprobs=1, **GREEDY)
    longer = await openai.completions.create(prompt="Echo", max_tokens=3, echo=True, logprobs=1, **GREEDY)
    assert scored.choices[0].text == "Echo"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(
        longer.choices[0].logprobs.token_logprobs[:4], abs=1e-4
    )


async def test_a_prompt_that_shares_its_beginning_is_counted_as_cached(openai):
    prompt = "A long beginning that many prompts share. " * 4
    await openai.completions.create(prompt=prompt + "One", max_tokens=1, **GREEDY)
    again = await openai.completions.create(prompt=prompt + "Two", max_tokens=1, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens >= 128


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": "x" * 2048}, "context_length_exceeded", "prompt"),
        ({"prompt": "x", "max_tokens": 5000}, "context_length_exceeded", "prompt"),
        ({"prompt": [1, 2, 10**6]}, "invalid_request", "prompt"),
        ({"prompt": [1, -1]}, "invalid_request", "prompt"),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "x", "n": 0}, "invalid_request", "n"),
        ({"prompt": ["x"] * 2000}, "invalid_request", "n"),
        ({"prompt": ["x", [True]]}, "invalid_request", "prompt"),
        ({"prompt": "x", "extra_body": {"top_k": 2**64}}, "invalid_request", "top_k"),
        ({"prompt": "x", "extra_body": {"repetition_penalty": 1e-300}}, "invalid_request", "repetition_penalty"),
        ({"prompt": "x", "extra_body": {"stop_token_ids": [10**6]}}, "invalid_request", "stop_token_ids"),
    ],
)
async def test_what_can_never_be_answered_is_refused_at_once(openai, fields, code, param):
    with pytest.raises(BadRequestError) as caught:
        await openai.completions.create(**({"model": BASE} | fields))
    assert (caught.value.code, caught.value.param) == (code, param)


async def test_an_unknown_model_is_named(openai):
    for model in ("nobody", f"{BASE}:nobody", "nobody@2", "nobody@", f"{BASE}@1"):
        with pytest.raises(NotFoundError, match=model) as caught:
            await openai.completions.create(model=model, prompt="x")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_many_streams_at_once_are_each_as_alone(openai):
    async def ask(number: int) -> str:
        arguments = {"prompt": f"Number {number}", "max_tokens": 24, **GREEDY}
        return (await collect(await openai.completions.create(stream=True, **arguments)))[0]

    alone = [await ask(number) for number in range(6)]
    assert await asyncio.gather(*(ask(number) for number in range(6))) == alone


async def test_a_full_server_says_so_and_when_to_come_back(openai, server):
    with (
        server.context.admission.admit(server.context.admission.capacity),
        pytest.raises(InternalServerError) as caught,
    ):
        await openai.completions.create(model=BASE, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"
