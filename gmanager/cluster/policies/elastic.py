"""The default: as few instances as let all that is known to wait end soonest."""

from gmanager.cluster.policies.base import Policy


class Elastic(Policy):
    """Degree 1, unless more gain."""

    name = "elastic"
