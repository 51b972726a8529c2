"""The window rule."""

import pytest

from nat_models.ops.window import window


@pytest.mark.parametrize(
    ("length", "kernel_size", "dilation"), [(7, 7, 1), (13, 5, 1), (29, 7, 4), (31, 3, 8), (5, 1, 1), (7, 1, 3)]
)
def test_every_query_has_exactly_k_distinct_keys_of_its_group(length, kernel_size, dilation):
    keys, offsets = window(length, kernel_size, dilation)
    for query in range(length):
        row = keys[query].tolist()
        assert len(set(row)) == kernel_size
        assert all(0 <= key < length and key % dilation == query % dilation for key in row)
        assert query in row
        # The nearest: as many before as after the query, but for what a border shifts inward.
        first = (query // dilation - kernel_size // 2) * dilation + query % dilation
        last_first = (
            (length - 1 - query % dilation) // dilation * dilation + query % dilation - (kernel_size - 1) * dilation
        )
        first = min(max(first, query % dilation), last_first)
        assert row == [first + i * dilation for i in range(kernel_size)]
        assert offsets[query].tolist() == [(key - query) // dilation + kernel_size - 1 for key in row]


def test_a_window_is_made_on_the_device_asked_for_and_dense_by_default():
    assert {x.device.type for x in window(9, 3, device="meta")} == {"meta"}
    for default, dense in zip(window(9, 3), window(9, 3, 1), strict=True):
        assert default.equal(dense)
