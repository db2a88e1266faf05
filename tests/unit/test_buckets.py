"""Claims about the grouping of tensors: order, limits of each holder, and room that is there anyway."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlsync.layout.geometry import TensorSpec
from rlsync.plan.buckets import grouped, limits_of


def specs(count: int) -> list[TensorSpec]:
    return [TensorSpec(f"t{n}", "uint8", (1,)) for n in range(count)]


shares = st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), max_size=20)


@given(shares, st.integers(1, 120))
def test_groups_keep_the_order_and_nobody_has_more_than_its_limit(rows, bucket_bytes):
    tensors = specs(len(rows))
    by_name = dict(zip((t.name for t in tensors), rows, strict=True))
    limits = limits_of(by_name, bucket_bytes)
    groups = grouped(tensors, by_name, limits)
    assert [t for group in groups for t in group] == tensors
    had = [{h: sum(by_name[t.name].get(h, 0) for t in group) for h in "abc"} for group in groups]
    assert all(nbytes <= limits.get(h, 0) for row in had for h, nbytes in row.items())
    for row, later in zip(had, groups[1:], strict=False):
        first = by_name[later[0].name]
        assert any(row[h] + nbytes > limits[h] for h, nbytes in first.items()), "nobody had its fill"


def test_whoever_has_a_large_tensor_may_have_as_much_in_each_bucket_and_nobody_else():
    tensors = specs(8)
    apart = {t.name: {"a" if n < 4 else "b": 10} for n, t in enumerate(tensors)} | {"t0": {"a": 30}}
    limits = limits_of(apart, 10)
    assert limits == {"a": 30, "b": 10}
    assert [len(group) for group in grouped(tensors, apart, limits)] == [1, 3 + 1, 1, 1, 1]
    assert [len(group) for group in grouped(tensors, apart, limits_of(apart, None))] == [8]


def test_a_tensor_beyond_a_limit_that_is_kept_has_a_group_that_ends_with_it():
    alone = {t.name: {"file": nbytes} for t, nbytes in zip(specs(5), (3, 3, 20, 3, 3), strict=True)}
    assert [len(group) for group in grouped(specs(5), alone, {"file": 6})] == [2, 1, 2]
