"""Schedulers of diffusers as samplers: made from a recipe, run, and read off."""

from ddss_lightning.probing.basis import is_learned, probe
from ddss_lightning.probing.loop import NotAGGDMError, run_scheduler, scheduler_steps
from ddss_lightning.probing.named import build_scheduler
from ddss_lightning.probing.verification import rollout_error

__all__ = [
    "NotAGGDMError",
    "build_scheduler",
    "is_learned",
    "probe",
    "rollout_error",
    "run_scheduler",
    "scheduler_steps",
]
