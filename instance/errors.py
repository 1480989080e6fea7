"""Why an instance ends, or doesn't begin, in words that need no traceback."""


class InstanceError(Exception):
    """The instance can't go on; the message says why."""


class EpochEnded(InstanceError):
    """The gManager ended the cell."""


class WasDrained(InstanceError):
    """The instance is no member of its cell any more: what could be moved from it is elsewhere."""


class PartyTimeout(InstanceError):
    """Members did not bring their notices in time."""


class PartyBroken(InstanceError):
    """Members don't understand each other."""


class StepTimeout(InstanceError):
    """The device did not end a step in time."""


class UnsupportedModel(ValueError):
    """The checkpoint needs something that is not implemented; the message names it."""
