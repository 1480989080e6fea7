"""Policies, by name."""

from gmanager.cluster.policies.base import NewHolder, NewHome, Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.elastic import Elastic
from gmanager.cluster.policies.infinite import Infinite
from gmanager.cluster.policies.loong import Loong
from gmanager.cluster.policies.split import Split
from gmanager.cluster.policies.static import Static

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Elastic, Static, Infinite, Loong, Split)}

__all__ = [
    "POLICIES",
    "Elastic",
    "Infinite",
    "Loong",
    "NewHolder",
    "NewHome",
    "Outlook",
    "Policy",
    "Prompt",
    "Relocation",
    "SequenceView",
    "Split",
    "Static",
]
