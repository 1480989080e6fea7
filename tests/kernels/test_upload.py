"""Tables at fixed addresses: what each step wrote is what its kernels read, with steps in flight."""

from array import array

import pytest

from kernels.upload import FixedTables
from tests.kernels.test_paged_attention import DEVICE


def test_each_step_reads_what_it_wrote() -> None:
    tables = FixedTables({"a": 3, "b": 2, "blocks": 100}, DEVICE)
    addresses = [tables[name].data_ptr() for name in ("a", "b", "blocks")]
    seen = []
    for step in range(7):
        tables.begin()
        tables.write("a", array("i", [step, step + 1, step + 2]))
        tables.write("b", array("i", [10 * step, -1]))
        tables.write("blocks", array("i", range(step)))
        tables.upload()
        seen.append([tables[name].clone() for name in ("a", "b", "blocks")])  # queued behind the copy, as a step is
    for step, (a, b, blocks) in enumerate(seen):
        assert a.tolist() == [step, step + 1, step + 2]
        assert b.tolist() == [10 * step, -1]
        assert blocks[:step].tolist() == list(range(step))
    assert [tables[name].data_ptr() for name in ("a", "b", "blocks")] == addresses


def test_too_many_entries_are_refused_with_their_numbers() -> None:
    tables = FixedTables({"a": 3, "b": 2}, DEVICE)
    tables.begin()
    with pytest.raises(ValueError, match="4 entries for table 'a' of 3"):
        tables.write("a", array("i", [1, 2, 3, 4]))
