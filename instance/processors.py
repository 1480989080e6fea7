"""A GPU's processors: all of them for a lane alone, disjoint parts while both lanes have work.

Decodes wait for memory and prompts for the tensor cores; side by side they need not wait for each other. But a kernel of a
prompt fills every processor it finds, so beside it on plain streams a decode step takes 11 to 21 times as long. Green contexts
give each lane's streams processors of its own. Sources: CUDA driver API, "Green Contexts"; SGLang's PD multiplexing; Bullet
(arXiv:2504.19516) and Nexus (arXiv:2507.06608), which split a GPU between prefill and decode.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gmanager.wire.logs import get_logger
from instance.errors import InstanceError
from instance.model import Model
from instance.sharing import SPLITS, Costs, Sharing
from instance.step import Lane
from kernels.driver import DriverError, call, driver

log = get_logger("instance")


def queues_of_their_own() -> None:
    """To be called before this process first uses CUDA: each stream gets a hardware queue to itself, up to the 32 there are.

    By default streams share eight, and what waits in one of them holds up what stands behind it, whichever lane's it is: a
    kernel of one lane that waits for a peer would hold what the other lane's peer waits for.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@dataclass(frozen=True, slots=True)
class Processors:
    """Streams of one GPU. Those of one lane are never used at the same time: each step waits for the one before."""

    total: int
    streams: dict[Lane, dict[int, torch.cuda.Stream]]
    """By lane and number of processors; those with all of them may overlap all others."""

    @property
    def splits(self) -> tuple[int, ...]:
        """Processors that the decode lane can have, the rest being the prefill lane's; ascending."""
        return tuple(sorted(count for count in self.streams["decode"] if count < self.total))

    @staticmethod
    def of(device: torch.device, splits: Sequence[int] = SPLITS) -> "Processors":
        """Divide a CUDA device for the lanes of this process. Where that can't be done decodes come first in a plain way.

        Raises InstanceError as `check_parts` does.
        """
        total = check_parts(splits, device)
        new: Any = torch.cuda.Stream  # its constructor has no types
        streams: dict[Lane, dict[int, torch.cuda.Stream]] = {
            "prefill": {total: new(device)},
            "decode": {total: new(device, priority=-1)},
        }
        try:
            for count in splits:
                decode, prefill = _divide(device, count)
                streams["decode"][count] = decode
                streams["prefill"][total - count] = prefill
        except DriverError as error:
            log.warning("decodes will wait for prompts: the GPU can't be divided", reason=str(error))
        return Processors(total, streams)


def check_parts(splits: Sequence[int], device: torch.device) -> int:
    """The processors of a CUDA device. Raises InstanceError if one of the parts leaves none of them for prompts."""
    total = torch.cuda.get_device_properties(device).multi_processor_count
    if splits and max(splits) > total - 8:
        raise InstanceError(
            f"--decode-processors {max(splits)} leaves prompts none: the GPU has {total}, parts are of 8 at least"
        )
    return total


def sharing_of(model: Model, processors: Processors) -> Sharing:
    """How this model's lanes share them."""
    costs = Costs(
        weight_bytes=model.weight_bytes(),
        token_bytes=model.token_bytes(),
        flops_per_row=2 * sum(p.numel() for p in model.module.parameters()),
    )
    return Sharing(processors.total, processors.splits, costs)


def _divide(device: torch.device, count: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Streams on `count` processors, and on all others. Raises DriverError."""
    kinds = driver()
    torch.cuda.current_stream(device).synchronize()  # the primary context is there from now on
    number = call("cuDeviceGet", device.index)[0]
    whole = call("cuDeviceGetDevResource", number, kinds.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)[0]
    groups, _, rest = call("cuDevSmResourceSplitByCount", 1, whole, 0, count)
    streams = []
    wrap: Any = torch.cuda.ExternalStream
    for resource in (groups[0], rest):
        description = call("cuDevResourceGenerateDesc", [resource], 1)[0]
        flags = kinds.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = call("cuGreenCtxCreate", description, number, flags)[0]
        stream = call("cuGreenCtxStreamCreate", context, kinds.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)[0]
        streams.append(wrap(int(stream), device=device))
    return streams[0], streams[1]
