"""How the memory of an engine divides into weights, KV cache, adapters, activations and the process around them."""

from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.block_pool import BlockPool
from onebase_server.engine.request import EngineMemory
from onebase_server.engine.runner import Runner
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import kv_bytes_per_block
from onebase_server.process_memory import resident_bytes


class MemoryMeter:
    """Measures one engine, cheaply enough for every step.

    On a CPU the KV cache and the arena are reserved, but a page of them is there only once it has been written: they
    count as far as they have been used. On a GPU all of them is taken at the start, and none of it is in the process.
    """

    def __init__(self, decoder: Decoder, block_pool: BlockPool, adapter_pool: AdapterPool, runner: Runner) -> None:
        self._is_cpu = decoder.device.type == "cpu"
        self._weights = decoder.weight_bytes
        self._block_bytes = kv_bytes_per_block(decoder.config, block_pool.block_size, decoder.dtype)
        self._activations = runner.activation_bytes
        self._block_pool = block_pool
        self._adapter_pool = adapter_pool

    def measure(self) -> EngineMemory:
        """The parts now; `runtime` is what remains of the process's resident memory."""
        blocks, adapters = self._block_pool, self._adapter_pool
        kv_cache = self._block_bytes * (blocks.num_touched if self._is_cpu else blocks.num_blocks)
        arena = adapters.bytes_touched if self._is_cpu else adapters.bytes_total
        held = self._weights + kv_cache + arena + adapters.table.nbytes + self._activations
        return EngineMemory(
            weights=self._weights,
            kv_cache=kv_cache,
            adapters=arena + adapters.table.nbytes,
            activations=self._activations,
            # weights that are mapped from a file are not resident before they are read for the first time
            runtime=max(0, resident_bytes() - (held if self._is_cpu else 0)),
        )
