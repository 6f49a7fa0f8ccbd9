# SPDX-License-Identifier: MIT
"""The store behind SGLang's pool in the host's memory (HiCache)."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName
from sglang.srt.runtime_context import get_server_args

from ucm_sdk import StoreContext
from ucm_sdk.connector import LoadPlan, SavePlan, StepPlan, load_config
from ucm_sdk.connector.others import OtherLayouts, Prompt, Run, conversions
from ucm_sdk.errors import ConfigError, UcmError
from ucm_sdk.telemetry import Recorder
from ucm_sglang import compat, layout
from ucm_sglang.metrics import PromMetrics
from ucm_sglang.scheduler import PAGES, PageNames
from ucm_sglang.worker import SglangWorker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    from ucm_sdk.connector.plans import Conversion

logger = logging.getLogger(__name__)

_LOAD: Final = "hicache"


class UcmHiCacheStorage(HiCacheStorage):
    """Pages of the host's pool in a store, filled and read in place.

    SGLang asks from one thread that prefetches and one that writes back.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, arguments: dict[str, Any]) -> None:
        """Check the configuration; the store is opened when SGLang gives its pool."""
        del arguments
        extra = dict(storage_config.extra_config or {})
        if not extra.get("interface_v1"):
            msg = 'ucm_sglang reads and writes in place: add "interface_v1": 1 to the extra config'
            raise ConfigError(msg)
        self._ucm = load_config({k: v for k, v in extra.items() if k not in layout.SGLANGS_KEYS})
        if (warning := compat.check_version()) is not None:
            logger.warning(warning)
        self._config = storage_config
        self._lookups = threading.Lock()
        self._saves = threading.Lock()
        self._runs: OrderedDict[str, tuple[Run, ...]] = OrderedDict()
        """Where the pages lie that were found in other layouts, by page."""
        self._serial = 0

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool of KV and open the store for this rank's part of it."""
        super().register_mem_pool_host(mem_pool_host)
        pool, config, ucm = mem_pool_host, self._config, self._ucm
        layout.check_host_pool(pool)
        server = get_server_args()
        layout.check_attention(server, ucm)
        model = layout.model_of(server)
        mla = layout.is_mla(pool)
        self._owns = not mla or config.tp_rank == 0
        self._page = pool.page_size
        recorder = Recorder()
        heads = model.get_total_num_kv_heads()
        context = StoreContext(
            namespace=layout.make_namespace(server, model, pool, ucm),
            layout=layout.make_layout(pool, ranks=config.tp_size, total_heads=heads),
            shard=0 if mla else config.tp_rank,
            recorder=recorder,
        )
        memory = layout.make_host_memory(pool, context.layout)
        self._store = layout.open_shared_store(ucm, context)
        self._others = OtherLayouts(self._store) if ucm.connector.other_layouts else None
        # Each of SGLang's two threads has its own.
        self._loader, self._saver = (
            SglangWorker(layout.open_shared_store(ucm, context), ucm.connector, memory)
            for _ in range(2)
        )
        self._names = PageNames(context.namespace.digest(), self._page, model.vocab_size)
        self._metrics = PromMetrics(recorder, rank=config.tp_rank)
        compat.watch(self)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse pools beside that of KV."""
        if host_pool_name != PoolName.KV:
            msg = f"ucm_sglang keeps KV only; this model has a pool {host_pool_name} beside it"
            raise ConfigError(msg)
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def tokens(self, key: Any) -> None:
        """Name the pages of a key now: SGLang asks for them later and from other threads."""
        self._names.key = key
        self._names.compute()

    def computed(self, batch: Any, seconds: float) -> None:
        """Nothing: SGLang's own policy says when to prefetch."""

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many pages from the first on the store can give."""
        del extra_info
        ids = self._names.ids(keys)
        if not ids:
            return 0
        with self._lookups:
            try:
                return self._found(keys, ids)
            except UcmError as error:
                logger.warning("a lookup failed and counts as a miss: %s", error)
                return 0

    def _found(self, keys: Sequence[str], ids: Sequence[bytes]) -> int:
        lease_s = self._ucm.connector.lease_s
        count = self._store.lookup_prefix(ids, lease_s=lease_s)
        page = self._names.source(keys[-1])
        if self._others is None or page is None or count == len(ids):
            return count
        first = page.index + 1 - len(ids)
        prompt = Prompt(page.tokens.astype(np.uint32), page.request_extra, {})
        runs = tuple(self._others.extend(prompt, first + count, page.index + 1, lease_s))
        found = runs[-1].end - first if runs else count
        self._runs.update(dict.fromkeys(keys[count:found], runs))
        while len(self._runs) > PAGES:
            self._runs.popitem(last=False)
        return found

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Fill the pool's pages; returns for each whether it is there."""
        del extra_info
        ids = self._names.ids(keys)
        if ids is None:
            return [False] * len(keys)
        pages = self._pages(host_indices)
        plan = LoadPlan(_LOAD, tuple(ids), tuple(pages), self._conversions(keys))
        failed = self._loader.load(StepPlan(loads=(plan,)))
        self._metrics.export()
        return [page not in failed for page in pages]

    def _conversions(self, keys: Sequence[str]) -> tuple[Conversion, ...]:
        # What follows pages of other layouts was found in them, too.
        with self._lookups:
            runs = self._runs.get(keys[-1], ())
        page = self._names.source(keys[-1])
        if not runs or page is None:
            return ()
        end = page.index + 1
        return conversions(runs, self._store.context.layout, end - len(keys), end)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Save the pool's pages; returns for each whether the store has it."""
        del extra_info
        if not self._owns:
            return [True] * len(keys)
        ids = self._names.ids(keys)
        if ids is None:
            return [False] * len(keys)
        with self._saves:
            self._serial += 1
            plan = SavePlan(self._serial, tuple(ids), tuple(self._pages(host_indices)))
            self._saver.save(plan)
            self._saver.drain([plan.serial])
            saved = bool(self._saver.ended(plan.serial))
            self._saver.forget(plan.serial)
        self._metrics.export()
        return [saved] * len(keys)

    def _pages(self, host_indices: Any) -> list[int]:
        return [int(slot) // self._page for slot in host_indices[:: self._page].tolist()]

    def exists(self, key: str) -> bool:
        """Return whether the store has a page."""
        return self.batch_exists([key]) == 1

    def clear(self) -> None:
        """Leave the store as it is: it is other engines', too."""

    def close(self) -> None:
        """Finish the saves and close the store."""
        compat.unwatch(self)
        self._loader.close()
        self._saver.close()
        if self._others is not None:
            self._others.close()
        self._store.close()
        self._metrics.export(now=True)

    def _refuse_copies(self, *_: Any, **__: Any) -> NoReturn:
        msg = 'ucm_sglang does not copy pages: add "interface_v1": 1 to the extra config'
        raise ConfigError(msg)

    # SGLang's copying interface, which `interface_v1` replaces.
    get = set = batch_get = batch_set = _refuse_copies
