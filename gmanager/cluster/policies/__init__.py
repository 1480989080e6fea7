"""Policies, by name."""

from gmanager.cluster.policies.base import Outlook, Policy, Prompt
from gmanager.cluster.policies.elastic import Elastic
from gmanager.cluster.policies.static import Static

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Elastic, Static)}

__all__ = ["POLICIES", "Elastic", "Outlook", "Policy", "Prompt", "Static"]
