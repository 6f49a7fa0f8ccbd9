# SPDX-License-Identifier: MIT
from __future__ import annotations

import numpy as np
import pytest

from ucm_sdk import ID_BYTES, ROW, Batch, KVLayout, as_block_ids
from ucm_sdk._native import crc32c, status_text, versions
from ucm_sdk.errors import ArgumentError, Status, StoreError, UcmError, error_for

BASE = {
    "block_tokens": 2,
    "piece_bytes": (1,),
    "kv_heads": 1,
    "head_size": 1,
    "dtype": "a",
    "packing": "b",
}


def test_ids_come_as_bytes_or_as_an_array_that_is_not_copied() -> None:
    ids = [bytes([i]) * ID_BYTES for i in range(3)]
    array = as_block_ids(ids)
    assert array.shape == (3, ID_BYTES)
    assert as_block_ids(array) is array
    assert as_block_ids([]).shape == (0, ID_BYTES)


@pytest.mark.parametrize("lengths", [(31,), (33,), (31, 33), (0,)])
def test_ids_of_another_length_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="32 bytes; got ids of"):
        as_block_ids([bytes(length) for length in lengths])


def test_arrays_of_another_shape_are_refused() -> None:
    for array in (np.zeros((2, 31), np.uint8), np.zeros(32, np.uint8), np.zeros((1, 32), np.int8)):
        with pytest.raises(ArgumentError, match="block ids must be"):
            as_block_ids(array)


def test_a_row_is_what_the_c_library_expects() -> None:
    assert ROW.itemsize == 24
    fields = ROW.fields or {}
    assert [fields[name][1] for name in ("block", "length", "offset", "address")] == [0, 4, 8, 16]


def test_a_batch_of_pieces_names_every_piece_of_every_block() -> None:
    layout = KVLayout(2, (10, 20), 1, 1, "int8", "x")
    addresses = np.array([[100, 200], [300, 400], [500, 600]], np.uint64)
    batch = Batch.pieces(
        [bytes(32)] * 3,
        offsets=layout.piece_offsets,
        lengths=layout.piece_lengths,
        addresses=addresses,
    )
    assert batch.rows.tolist() == [
        (0, 10, 0, 100), (0, 20, 10, 200),
        (1, 10, 0, 300), (1, 20, 10, 400),
        (2, 10, 0, 500), (2, 20, 10, 600),
    ]  # fmt: skip
    assert batch.size_bytes == 90
    with pytest.raises(ArgumentError, match="addresses of shape"):
        Batch.pieces(
            [bytes(32)],
            offsets=layout.piece_offsets,
            lengths=layout.piece_lengths,
            addresses=addresses,
        )


def test_layouts_differ_wherever_bytes_would() -> None:
    changes: dict[str, object] = {
        "block_tokens": 4, "piece_bytes": (1, 1), "kv_heads": 2, "head_size": 2,
        "dtype": "c", "packing": "d", "shards": 2,
    }  # fmt: skip
    digests = {KVLayout(**BASE).digest()}
    digests |= {KVLayout(**{**BASE, name: value}).digest() for name, value in changes.items()}
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    "change", [{"block_tokens": 0}, {"piece_bytes": ()}, {"piece_bytes": (0,)}]
)
def test_layouts_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"KVLayout.{next(iter(change))}"):
        KVLayout(**{**BASE, **change})


def test_statuses_are_the_c_librarys() -> None:
    for status in Status:
        assert status_text(status) != "unknown status"
    assert status_text(min(Status) - 1) == "unknown status"


def test_every_status_has_an_error_that_is_also_a_builtin() -> None:
    for status in Status:
        error = error_for(status, "what happened")
        assert isinstance(error, UcmError)
        assert "what happened" in str(error)
    assert isinstance(error_for(Status.TIMEOUT, ""), TimeoutError)
    assert isinstance(error_for(Status.MISSING, ""), LookupError)
    assert isinstance(error_for(Status.ACCESS, ""), PermissionError)
    assert isinstance(error_for(Status.IO, ""), StoreError | OSError)


def test_crc32c_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
    assert versions()["crc32c"] in {"portable", "pclmul", "armv8"}
