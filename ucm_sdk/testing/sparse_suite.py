# SPDX-License-Identifier: MIT
"""What every sparse attention method must do, whatever it chooses by."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from ucm_sdk.sparse import (
    AttentionGeometry,
    SparseBudget,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)

GEOMETRY: Final = AttentionGeometry(layers=3, kv_heads=3, group=2, head_size=32, block_tokens=16)
_BLOCKS: Final = 40
_PROMPT: Final = _BLOCKS * GEOMETRY.block_tokens


def keys_of(blocks: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random keys, ``[n, H, B, d]``, with an offset that all share, as RoPE leaves one."""
    random = np.random.default_rng(seed)
    shape = (blocks, GEOMETRY.kv_heads, GEOMETRY.block_tokens, GEOMETRY.head_size)
    offset = np.linspace(-1, 1, GEOMETRY.head_size)
    return (random.standard_normal(shape) + offset).astype(np.float32)


def query_of(seed: int = 0) -> NDArray[np.float32]:
    """Return one token's queries, ``[H, g, d]``."""
    shape = (GEOMETRY.kv_heads, GEOMETRY.group, GEOMETRY.head_size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plant(keys: NDArray[np.float32], block: int, query: NDArray[np.float32]) -> None:
    """Make every key of a block point where the query heads of its KV head look, on average."""
    direction = query.mean(1)
    direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    keys[block] = 40 * direction[:, None, :]


class SparseSuite:
    """Subclass it and name the method; ``arrays`` may put NumPy arrays into another library."""

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    finds: ClassVar[bool] = True
    """Whether the method looks at keys at all."""

    @staticmethod
    def arrays(array: NDArray[Any]) -> Any:
        """Return the array as the library under test has it."""
        return array

    def make(self, **options: Any) -> UcmSparseBase:
        """Return the method."""
        return make_method(self.method, GEOMETRY, options={**self.options, **options})

    def manager(
        self, *, ratio: float = 0.2, prompt_tokens: int = _PROMPT, **options: Any
    ) -> SparseKVManager:
        """Return a manager with one request, ``chatcmpl-1``, without summaries."""
        manager = SparseKVManager(self.make(**options), SparseBudget(ratio=ratio, min_tokens=0))
        manager.request_begin("chatcmpl-1", prompt_tokens)
        return manager

    def summarise(
        self, manager: SparseKVManager, keys: NDArray[np.float32], *, layer: int, tokens: int
    ) -> None:
        manager.summarise(
            "chatcmpl-1",
            layer,
            tokens=tokens,
            keys=lambda blocks: self.arrays(keys[blocks.start : blocks.stop : blocks.step]),
        )

    def layer(self, manager: SparseKVManager) -> int:
        """Return a layer that chooses."""
        layers = range(GEOMETRY.layers)
        return next(layer for layer in layers if manager.method.source_layer(layer) == layer)

    def chosen(
        self, manager: SparseKVManager, keys: NDArray[np.float32], query: Any, tokens: int = _PROMPT
    ) -> NDArray[np.int64]:
        layer = self.layer(manager)
        self.summarise(manager, keys, layer=layer, tokens=tokens)
        choice = manager.choose("chatcmpl-1", layer, self.arrays(query), tokens=tokens)
        assert choice is not None
        return choice.middle

    @pytest.mark.parametrize("ratio", [0.03, 0.2, 0.5, 1.0])
    @pytest.mark.parametrize("share", ["layer", "kv_head"])
    def test_a_choice_is_within_the_middle_and_the_budget(self, ratio: float, share: str) -> None:
        manager = self.manager(ratio=ratio, share=share)
        middle = self.chosen(manager, keys_of(_BLOCKS), query_of())
        cut = manager.budget.cut(_PROMPT, GEOMETRY.block_tokens)
        assert middle.shape == (1 if share == "layer" else GEOMETRY.kv_heads, cut.chosen)
        assert (np.diff(middle, axis=-1) > 0).all()
        assert middle.min() >= cut.first
        assert middle.max() < cut.last

    def test_the_full_budget_chooses_everything(self) -> None:
        manager = self.manager(ratio=1.0)
        middle = self.chosen(manager, keys_of(_BLOCKS), query_of())
        cut = manager.budget.cut(_PROMPT, GEOMETRY.block_tokens)
        assert middle[0].tolist() == list(range(cut.first, cut.last))

    @pytest.mark.parametrize("place", [1, 17, 36])
    def test_a_block_that_the_query_looks_for_is_found(self, place: int) -> None:
        if not self.finds:
            pytest.skip("this method does not look at keys")
        keys, query = keys_of(_BLOCKS), query_of()
        plant(keys, place, query)
        assert place in self.chosen(self.manager(), keys, query)

    def test_heads_are_not_mixed_up(self) -> None:
        if not self.finds:
            pytest.skip("this method does not look at keys")
        keys, query = keys_of(_BLOCKS), query_of()
        aligned = keys_of(_BLOCKS)
        for head, place in enumerate((5, 12, 30)):
            plant(aligned, place, query)
            keys[place, head] = aligned[place, head]
        middle = self.chosen(self.manager(ratio=0.06, share="kv_head"), keys, query)
        for head, place in enumerate((5, 12, 30)):
            assert place in middle[head]

    def test_blocks_are_summarised_one_by_one_or_together(self) -> None:
        method, keys = self.make(), self.arrays(keys_of(8))
        basis = method.fit(2, keys)
        whole = method.summarise(keys, basis)
        single = [method.summarise(keys[block : block + 1], basis) for block in range(8)]
        for index, field in enumerate(method.fields):
            parts = np.concatenate([np.asarray(one[index]) for one in single])
            assert parts.shape == (8, GEOMETRY.kv_heads, *field.shape)
            assert (parts == np.asarray(whole[index])).all()

    def test_chunked_prefill_gives_what_one_prefill_gives(self) -> None:
        keys, query = keys_of(_BLOCKS), query_of()
        once = self.chosen(self.manager(), keys, query)
        manager = self.manager()
        for tokens in (100, 101, 300, 512, _PROMPT):
            self.summarise(manager, keys, layer=self.layer(manager), tokens=tokens)
        assert (self.chosen(manager, keys, query) == once).all()

    def test_what_is_generated_can_be_chosen_once_its_block_is_whole(self) -> None:
        if not self.finds:
            pytest.skip("this method does not look at keys")
        query, place = query_of(), _BLOCKS + 1
        keys = keys_of(_BLOCKS + 8)
        plant(keys, place, query)
        manager = self.manager(stride=1)
        size = GEOMETRY.block_tokens
        for tokens in range(_PROMPT, (_BLOCKS + 8) * size):
            middle = self.chosen(manager, keys, query, tokens)
            if manager.budget.cut(tokens, size).last > place:
                assert place in middle
                break
        else:
            pytest.fail("the block never came into the middle")

    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_a_choice_is_made_anew_after_its_stride(self, stride: int) -> None:
        if not self.finds:
            pytest.skip("this method does not look at keys")
        keys, first, second = keys_of(_BLOCKS), query_of(1), -query_of(1)
        plant(keys, 7, first)
        plant(keys, 23, second)
        manager = self.manager(ratio=0.06, stride=stride)
        assert 7 in self.chosen(manager, keys, first)
        seen = [23 in self.chosen(manager, keys, second) for _ in range(2 * stride)]
        assert seen == [False] * (stride - 1) + [True] * (stride + 1)

    def test_a_rewound_request_is_summarised_again(self) -> None:
        manager, keys, query = self.manager(), keys_of(_BLOCKS), query_of()
        wrong = keys_of(_BLOCKS, seed=9)
        once = self.chosen(self.manager(), keys, query)
        self.summarise(manager, wrong, layer=self.layer(manager), tokens=_PROMPT)
        manager.rewind("chatcmpl-1", self.layer(manager), 0)
        assert (self.chosen(manager, keys, query) == once).all()

    @pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
    def test_keys_that_are_all_alike_are_chosen_from(self, value: float) -> None:
        keys = np.full_like(keys_of(_BLOCKS), value)
        middle = self.chosen(self.manager(), keys, query_of() * 100)
        assert len(set(middle[0].tolist())) == middle.shape[1]

    def test_half_precision_keys_choose_the_same(self) -> None:
        if not self.finds:
            pytest.skip("this method does not look at keys")
        keys, query = keys_of(_BLOCKS), query_of()
        plant(keys, 20, query)
        manager, layer = self.manager(ratio=0.06), 2
        self.summarise(manager, keys.astype(np.float16), layer=layer, tokens=_PROMPT)
        choice = manager.choose("chatcmpl-1", layer, self.arrays(query), tokens=_PROMPT)
        assert choice is not None
        assert 20 in choice.middle

    def test_a_finished_request_leaves_nothing(self) -> None:
        manager = self.manager()
        self.chosen(manager, keys_of(_BLOCKS), query_of())
        assert manager.summary_bytes() > 0
        manager.request_finished("chatcmpl-1")
        assert manager.summary_bytes() == 0
        assert "chatcmpl-1" not in manager
        manager.request_finished("chatcmpl-1")  # an abort may come twice

    def test_bytes_are_those_of_the_arrays(self) -> None:
        method = self.make()
        summaries = method.summarise(keys_of(2), method.fit(2, keys_of(2)))
        held = sum(array[0, 0].nbytes for array in summaries)
        if self.finds:
            assert method.block_bytes(4) == held
