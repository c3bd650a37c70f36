"""The engine's log-probabilities in OpenAI's two forms: chat's objects, and completions' parallel lists."""

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from onebase_server.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from onebase_server.engine.request import Logprob
from onebase_server.model.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[Logprob]) -> ChatLogprobs:
    """One entry per token, with the token's bytes: several tokens may make one character."""
    return ChatLogprobs([_chat_entry(tokenizer, logprob) for logprob in logprobs])


def _chat_entry(tokenizer: Tokenizer, logprob: Logprob) -> ChatTokenLogprob:
    token = tokenizer.id_to_token_text(logprob.token_id)
    top = [
        TopLogprob(tokenizer.id_to_token_text(token_id), value, list(tokenizer.token_bytes(token_id)))
        for token_id, value in logprob.top
    ]
    return ChatTokenLogprob(token, logprob.logprob, list(tokenizer.token_bytes(logprob.token_id)), top)


class CompletionLogprobsFormatter:
    """Formats one sequence's tokens as they come, counting where each begins in the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text_offset = 0
        self._characters = getincrementaldecoder("utf-8")(errors="replace")

    def format(self, token_ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> CompletionLogprobs:
        """The next tokens; None stands for the prompt's first token, which nothing precedes."""
        return CompletionLogprobs(
            tokens=[self._tokenizer.id_to_token_text(token_id) for token_id in token_ids],
            token_logprobs=[None if logprob is None else logprob.logprob for logprob in logprobs],
            top_logprobs=[None if logprob is None else self._alternatives(logprob) for logprob in logprobs],
            text_offset=[self._advance(token_id) for token_id in token_ids],
        )

    def _alternatives(self, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens and the chosen one; of those that look alike the likeliest stays."""
        alternatives: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            alternatives.setdefault(self._tokenizer.id_to_token_text(token_id), value)
        return alternatives

    def _advance(self, token_id: int) -> int:
        """Where a token begins; a character of several tokens counts with the last of them."""
        offset = self._text_offset
        self._text_offset += len(self._characters.decode(self._tokenizer.token_bytes(token_id)))
        return offset


def join_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Lists one after the other."""
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
