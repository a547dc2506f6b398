"""Giving back what pruning took, by a little tuning."""

from secateur.recovery.methods import METHODS
from secateur.recovery.recover import recover_model
from secateur.recovery.settings import RecoveryLog, RecoverySettings, recovery_settings
from secateur.recovery.teacher import Teacher

__all__ = ["METHODS", "RecoveryLog", "RecoverySettings", "Teacher", "recover_model", "recovery_settings"]
