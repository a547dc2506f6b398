"""The policies that give each block its own ratio by what was measured: listed here and nowhere else."""

from __future__ import annotations

from secateur.allocation.alpha import Alpha
from secateur.allocation.owl import OWL
from secateur.allocation.policy import Policy
from secateur.allocation.sensitivity import Sensitivity

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Alpha, OWL, Sensitivity)}
