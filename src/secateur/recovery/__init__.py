"""Giving back what pruning took, by a little tuning."""

from secateur.recovery.lora import block_linears, recover_model
from secateur.recovery.settings import LoraSettings, RecoveryLog, lora_settings

__all__ = ["LoraSettings", "RecoveryLog", "block_linears", "lora_settings", "recover_model"]
