"""Turns a scheduled batch into tensors, runs the decoder on them, and brings the sampled tokens back.

The one place where sequences (Python) meet tensors. It decides nothing: what to compute is the scheduler's choice.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from functools import partial
from itertools import accumulate, repeat

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch, LoraBatch, ReplacedRows, Segment, StepInputs
from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.request import Logprob
from onebase_server.engine.sampler import chosen_logprobs, sample, takes_best
from onebase_server.engine.scheduler import Batch, Sampled, ScheduledSequence
from onebase_server.engine.sequence import NO_SLOT, Sequence
from onebase_server.model.decoder import Decoder
from onebase_server.model.decoder_weights import DecoderNorms
from onebase_server.model.kv_cache import KvCache
from onebase_server.model.mixed_norms import AdaptedNorms, mix_norms
from onebase_server.model.vocabulary import AdaptedRows


class Runner:
    """Executes batches on one decoder, one KV cache and one pool of adapters."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KvCache,
        adapter_pool: AdapterPool,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """A step has at most `max_num_tokens` of `max_num_seqs` sequences, each at most `max_model_len` tokens long."""
        self.decoder = decoder
        self.adapter_pool = adapter_pool
        self.block_size = kv_cache.block_size
        largest = self._largest_step(max_num_tokens, min(max_num_seqs, max_num_tokens), max_model_len)
        self._forward_op_by_op = forward = partial(decoder.forward, kv_cache=kv_cache)
        self._forward = kernels.record(forward, largest) if decoder.is_recordable else forward

    @property
    def activation_bytes(self) -> int:
        """Memory of the recorded step; 0 for a back end that does not record."""
        return getattr(self._forward, "nbytes", 0)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[Sampled]:
        """Compute the batch's tokens and choose the next one of each sequence whose known tokens are through."""
        if not batch:
            return []
        token_ids = _int64s([t for e in batch.scheduled for t in e.sequence.tokens_at(e.start, e.stop)])
        lora = self._lora(batch)
        inputs = StepInputs(
            token_ids=token_ids,
            positions=_int64s([position for e in batch.scheduled for position in range(e.start, e.stop)]),
            attention=self._attention(batch),
            lora=lora,
            replaced=self._replace_embeddings(token_ids, lora.segments),
        )
        norms = self._norms(lora.segments)
        if norms is None:
            return self._collect(batch, self._forward(inputs))
        return self._collect(batch, self._forward_op_by_op(inputs.to(self.decoder.device), norms=norms))

    def _largest_step(self, num_tokens: int, num_seqs: int, context_len: int) -> StepInputs:
        """What stands for all steps: the last sequence has all tokens that the others leave."""
        numbers = torch.zeros(num_tokens, dtype=torch.int64)
        attention = AttentionBatch(
            query_starts=(*range(num_seqs), num_tokens),
            context_lens=(context_len,) * num_seqs,
            block_tables=torch.zeros(num_seqs, -(-context_len // self.block_size), dtype=torch.int32),
            slot_mapping=numbers,
        )
        return StepInputs(numbers, numbers, attention, self._lora_of(()))

    def _attention(self, batch: Batch) -> AttentionBatch:
        tables = [entry.sequence.block_table for entry in batch.scheduled]
        widest = max(map(len, tables))
        size = self.block_size
        slot_mapping = [
            entry.sequence.block_table[position // size] * size + position % size
            for entry in batch.scheduled
            for position in range(entry.start, entry.stop)
        ]
        padded = [block for table in tables for block in (*table, *repeat(0, widest - len(table)))]
        return AttentionBatch(
            query_starts=tuple(accumulate((entry.num_tokens for entry in batch.scheduled), initial=0)),
            context_lens=tuple(entry.stop for entry in batch.scheduled),
            block_tables=torch.frombuffer(array("i", padded), dtype=torch.int32).view(len(tables), widest),
            slot_mapping=_int64s(slot_mapping),
        )

    def _lora(self, batch: Batch) -> LoraBatch:
        """One segment for each run of tokens that the same adapter computes; the batch is ordered by slot."""
        segments: list[Segment] = []
        start = 0
        for entry in batch.scheduled:
            stop, slot = start + entry.num_tokens, entry.sequence.slot
            first = start + max(0, entry.sequence.first_adapted - entry.start)
            if slot != NO_SLOT and first < stop:
                if segments and segments[-1].slot == slot and segments[-1].stop == first:
                    segments[-1] = Segment(slot, segments[-1].start, stop)
                else:
                    segments.append(Segment(slot, first, stop))
            start = stop
        return self._lora_of(segments)

    def _lora_of(self, segments: Iterable[Segment]) -> LoraBatch:
        pool = self.adapter_pool
        table = pool.table.flatten(0, 1)
        return LoraBatch(pool.arena, table, tuple(segments), pool.max_rank, pool.alignment, pool.is_int8)

    def _replace_embeddings(self, token_ids: Tensor, segments: Iterable[Segment]) -> ReplacedRows | None:
        """What adapters have in place of the base's embeddings; tokens that the base has not become its first one."""
        vocabularies = self.adapter_pool.vocabularies
        if not vocabularies:
            return None
        replaced: list[ReplacedRows] = []
        for slot, start, stop in segments:
            if slot in vocabularies:
                own = self.decoder.embeddings_of(vocabularies[slot], token_ids[start:stop])
                if own is not None:
                    replaced.append(ReplacedRows(start + own.rows, own.vectors))
        if not replaced:
            return None
        token_ids.masked_fill_(token_ids >= self.decoder.config.vocab_size, 0)
        return ReplacedRows(torch.cat([own.rows for own in replaced]), torch.cat([own.vectors for own in replaced]))

    def _norms(self, segments: Iterable[Segment]) -> DecoderNorms | None:
        """Those of the step, where adapters replace some; such a step is computed op by op."""
        norms = self.adapter_pool.norms
        if not norms:
            return None
        own = [AdaptedNorms(start, stop, norms[slot]) for slot, start, stop in segments if slot in norms]
        return mix_norms(self.decoder.norms, own) if own else None

    def _logits(self, hidden: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Of hidden states [R, hidden], each of which is one sequence's."""
        vocabularies = self.adapter_pool.vocabularies
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences) if vocabularies else ():
            if sequence.slot in vocabularies:
                rows.setdefault(sequence.slot, []).append(row)
        return self.decoder.compute_logits(hidden, [AdaptedRows(of, vocabularies[slot]) for slot, of in rows.items()])

    def _collect(self, batch: Batch, hidden: Tensor) -> list[Sampled]:
        """Logits only where they are needed: each sampling sequence's last row, every row for prompt logprobs."""
        stops = list(accumulate(entry.num_tokens for entry in batch.scheduled))
        sampling = [i for i, e in enumerate(batch.scheduled) if e.samples and e.sequence.sampling.max_tokens > 0]
        prompt_logprobs = [
            self._prompt_logprobs(entry, hidden, stop) if entry.sequence.wants_prompt_logprobs else ()
            for entry, stop in zip(batch.scheduled, stops, strict=True)
        ]
        tokens: dict[int, int] = {}
        logprobs: dict[int, Logprob] = {}
        if sampling:
            last_rows = _take(hidden, [stops[i] - 1 for i in sampling])
            if self._takes_best(batch, sampling):
                tokens = dict(zip(sampling, self.decoder.best_tokens(last_rows).tolist(), strict=True))
            else:
                logits = self._logits(last_rows, [batch.scheduled[i].sequence for i in sampling])
                tokens, logprobs = self._sample(batch, sampling, logits)
        return [Sampled(tokens.get(i), logprobs.get(i), prompt_logprobs[i]) for i in range(len(batch.scheduled))]

    def _takes_best(self, batch: Batch, rows: list[int]) -> bool:
        """Whether every row's token can be found without its logits."""
        vocabularies = self.adapter_pool.vocabularies
        sequences = (batch.scheduled[i].sequence for i in rows)
        return self.decoder.finds_best_tokens and all(
            takes_best(s.sampling) and s.sampling.logprobs is None and s.slot not in vocabularies for s in sequences
        )

    def _sample(self, batch: Batch, rows: list[int], logits: Tensor) -> tuple[dict[int, int], dict[int, Logprob]]:
        sequences = [batch.scheduled[i].sequence for i in rows]
        reporting = [r for r, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
        raw = logits[reporting]  # a copy: sampling changes logits in place
        chosen = sample(logits, sequences)
        logprobs: dict[int, Logprob] = {}
        for r, row_logits in zip(reporting, raw, strict=True):
            num_top = sequences[r].sampling.logprobs or 0
            logprobs[rows[r]] = chosen_logprobs(row_logits.unsqueeze(0), [chosen[r]], num_top)[0]
        return dict(zip(rows, chosen, strict=True)), logprobs

    def _prompt_logprobs(self, entry: ScheduledSequence, hidden: Tensor, stop: int) -> tuple[Logprob, ...]:
        """Log-probabilities of the prompt tokens that follow this chunk's positions, whose rows end at `stop`."""
        sequence, start = entry.sequence, stop - entry.num_tokens
        prompt_end = sequence.num_virtual_tokens + sequence.num_prompt_tokens
        targets = sequence.tokens_at(entry.start + 1, min(entry.stop + 1, prompt_end))
        if not targets:
            return ()
        logits = self._logits(hidden[start : start + len(targets)], [sequence] * len(targets))
        return tuple(chosen_logprobs(logits, targets, sequence.sampling.prompt_logprobs or 0))


def _int64s(numbers: list[int]) -> Tensor:
    """At least one number as a tensor, by way of an array: `torch.tensor` takes twice as long for a list."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _take(hidden: Tensor, rows: list[int]) -> Tensor:
    """These rows; where they are all of them in order, as in a step of decoding, `hidden` itself."""
    if rows == [*range(hidden.shape[0])]:
        return hidden
    return hidden.index_select(0, torch.tensor(rows).to(hidden.device, non_blocking=True))
