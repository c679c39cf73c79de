"""`ddss compare`: many samplers of one model, judged alike."""

from ddss_lightning.compare.arguments import parse
from ddss_lightning.compare.run import compare
from ddss_lightning.compare.settings import Comparison

__all__ = ["Comparison", "compare", "parse"]
