# SPDX-License-Identifier: MIT
"""vLLM's requests beyond the context that the model was trained on: window extrapolation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from ucm_sdk.errors import ConfigError
from ucm_sdk.model_identity import find_model, rope_parameters, trained_tokens
from ucm_sdk.position import PositionMethod, make_position, make_rope
from ucm_sdk.position.paged import PagedAttention
from ucm_vllm.pages import LayerPages

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from ucm_sdk.connector.options import PositionConfig


def make_position_method(
    position: PositionConfig, config: VllmConfig, spec: FullAttentionSpec
) -> PositionMethod:
    """Return the configured method; raises ``ConfigError`` for what vLLM cannot do with it."""
    model = config.model_config
    rotated = int(model.hf_text_config.max_position_embeddings)
    if rotated < model.max_model_len:
        msg = (
            f"position: vLLM rotates positions below {rotated} only, and --max-model-len is "
            f"{model.max_model_len}: add --hf-overrides "
            f"'{{\"max_position_embeddings\": {model.max_model_len}}}'"
        )
        raise ConfigError(msg)
    # What the engine was told may have been changed, to let it take longer requests.
    tokens = position.trained_tokens
    if tokens is None:
        tokens = trained_tokens(find_model(model.model, model.revision))
    rope = make_rope(
        rope_parameters(model.hf_text_config), head_size=spec.head_size, context_tokens=tokens
    )
    return make_position(position.method, rope, options=position.options)


class VllmPosition:
    """Attends for those requests of a step that are longer than the method leaves alone."""

    def __init__(self, method: PositionMethod) -> None:
        """Attend by ``method``."""
        self._method = method
        self._paged: PagedAttention | None = None

    def long_rows(self, metadata: CPUAttentionMetadata) -> list[int]:
        """Return the rows of a step that are this method's."""
        most = self._method.plain_tokens
        if metadata.max_seq_len <= most:
            return []
        return [row for row, tokens in enumerate(metadata.seq_lens.tolist()) if tokens > most]

    def attend(  # noqa: PLR0917 - what vLLM's attention is given
        self,
        rows: list[int],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        """Write the outputs of ``rows``; ``query`` and ``output`` are ``[tokens, heads, d]``."""
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        tables, heads = metadata.block_table.numpy(), kv_cache.shape[1]
        pages = LayerPages(kv_cache)
        if pages.in_c:
            self._paged = self._paged or PagedAttention(self._method, scale=scale)
        for row in rows:
            first, last = starts[row], starts[row + 1]
            if pages.in_c and self._paged is not None:
                asked = query[first:last].unflatten(1, (heads, -1)).numpy()
                there = pages.addresses(tables[row], lengths[row])
                answers = self._paged.attend(asked, there, length=lengths[row])
                output[first:last] = torch.from_numpy(answers).flatten(1, 2)
                continue
            keys, values = pages.gather(tables[row], lengths[row])
            grouped = query[first:last].unflatten(1, (heads, -1)).permute(1, 2, 0, 3).float()
            found = self._method.attend(grouped, keys, values, scale=scale)
            output[first:last] = found.permute(2, 0, 1, 3).flatten(1, 2)
