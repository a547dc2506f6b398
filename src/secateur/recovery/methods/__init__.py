"""How a pruned model is tuned: one small file a method, listed here and nowhere else."""

from secateur.options import parse_named
from secateur.recovery.methods.base import Method, Student, Task
from secateur.recovery.methods.distill import Distill
from secateur.recovery.methods.full import Full
from secateur.recovery.methods.lora import LoRA
from secateur.recovery.methods.lora_prune import LoRAPrune
from secateur.recovery.methods.spp import SPP

METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, Full, Distill, SPP, LoRAPrune)}


def method_from(text: str) -> Method:
    """The method that ``"name:option=value,..."`` describes.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    return parse_named(text, METHODS)


__all__ = ["METHODS", "Method", "Student", "Task", "method_from"]
