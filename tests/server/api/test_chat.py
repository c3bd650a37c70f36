import pytest
from openai import BadRequestError

USER = [{"role": "user", "content": "Hi"}]
GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


async def test_the_answer_is_the_object_that_openai_sends(openai):
    completion = await openai.chat.completions.create(messages=USER, max_completion_tokens=5, **GREEDY)
    assert completion.object == "chat.completion"
    message = completion.choices[0].message
    assert (message.role, len(message.content)) == ("assistant", 5)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 5


async def test_the_prompt_is_the_rendered_template(openai):
    rendered = "[system]Be brief.\n[user]Hi\n[assistant]"
    chat = await openai.chat.completions.create(
        messages=[{"role": "developer", "content": "Be brief."}, *USER], max_completion_tokens=8, **GREEDY
    )
    completion = await openai.completions.create(prompt=rendered, max_tokens=8, **GREEDY)
    assert chat.choices[0].message.content == completion.choices[0].text
    assert chat.usage.prompt_tokens == len(rendered)


async def test_content_may_be_text_parts(openai):
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    answers = [
        await openai.chat.completions.create(messages=messages, max_completion_tokens=8, **GREEDY)
        for messages in (USER, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


async def test_an_answer_can_be_sent_back_as_a_message(openai):
    answer = await openai.chat.completions.create(messages=USER, max_completion_tokens=3, **GREEDY)
    again = [*USER, answer.choices[0].message, {"role": "user", "content": "More", "name": "Ann"}]
    assert (await openai.chat.completions.create(messages=again, max_completion_tokens=3, **GREEDY)).choices


async def test_without_a_limit_the_answer_may_fill_the_context(openai):
    prompt = [{"role": "user", "content": "x" * 1980}]
    completion = await openai.chat.completions.create(messages=prompt, **GREEDY)
    assert completion.usage.total_tokens == 2048
    assert completion.choices[0].finish_reason == "length"


async def test_a_stream_gives_the_role_the_text_the_reason_and_the_usage(openai):
    arguments = {"messages": USER, "max_completion_tokens": 12, **GREEDY}
    whole = await openai.chat.completions.create(**arguments)
    stream = await openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_streamed_choices_come_interleaved_by_index(openai):
    arguments = {"model": "tiny", "messages": USER, "max_completion_tokens": 10, "n": 3, "seed": 1}
    whole = await openai.chat.completions.create(**arguments)
    texts = ["", "", ""]
    order = []
    async for chunk in await openai.chat.completions.create(stream=True, **arguments):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert order != sorted(order)


async def test_logprobs_name_each_token_with_its_bytes_and_alternatives(openai):
    arguments = {"messages": USER, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 4, **GREEDY}
    completion = await openai.chat.completions.create(**arguments)
    entries = completion.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == completion.choices[0].message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest
    streamed = [
        entry.token
        async for chunk in await openai.chat.completions.create(stream=True, **arguments)
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs else [])
    ]
    assert streamed == [entry.token for entry in entries]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        ({"extra_body": {"typo": 1}}, "typo", "typo is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"messages": []}, "messages", "it should have at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "it must be text: a part of type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "Shorten the prompt"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(openai, fields, param, message):
    with pytest.raises(BadRequestError, match=message) as caught:
        await openai.chat.completions.create(**({"model": "tiny", "messages": USER} | fields))
    assert caught.value.param == param


async def test_fields_that_ask_for_nothing_are_accepted(openai):
    completion = await openai.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=2,
        user="someone",
        metadata={"a": "b"},
        store=False,
        tools=[],
        logit_bias={},
        response_format={"type": "text"},
        extra_body={"seed": None, "top_k": -1, "stop": None},
    )
    assert completion.choices
