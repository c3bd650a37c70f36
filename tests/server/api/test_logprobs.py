import pytest

from onebase_server.api.logprobs import CompletionLogprobsFormatter
from onebase_server.engine.request import Logprob


@pytest.mark.parametrize("step", [1, 3, 100])
def test_offsets_count_the_texts_characters_though_a_character_may_take_several_tokens(byte_tokenizer, step):
    formatter = CompletionLogprobsFormatter(byte_tokenizer)
    token_ids = byte_tokenizer.encode("aé😀b")
    offsets = []
    for start in range(0, len(token_ids), step):
        part = token_ids[start : start + step]
        offsets += formatter.format(part, [Logprob(token_id=i, logprob=0.0) for i in part]).text_offset
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 3]
