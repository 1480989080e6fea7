"""The communicator of an epoch: who waits in it is let go."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from instance.cell import EpochGroup, open_store


def test_who_waits_for_a_member_that_does_not_come_is_let_go() -> None:
    """As when one stands still while an epoch forms, and the others are to form another."""
    store, address = open_store("127.0.0.1", 60)
    with ThreadPoolExecutor(2) as threads:
        here, absent = threads.map(
            lambda rank: EpochGroup(
                store_address=address,
                host="127.0.0.1",
                name="test",
                rank=rank,
                size=2,
                device=torch.device("cpu"),
                timeout_s=60,
            ),
            range(2),
        )
        waiting = threads.submit(here.meet)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        here.close()
        with pytest.raises(RuntimeError):
            waiting.result(5)
        absent.close()
    del store
