"""What every benchmark writes: figures with machine, versions and date, as JSON and Markdown."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics

import ddss_lightning


def environment() -> dict[str, Any]:
    """Machine, accelerator if there is one, versions, number of threads, date."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "machine": f"{models[0] if models else platform.processor()} ({platform.machine()}), {platform.system()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchmetrics": torchmetrics.__version__,
        "ddss_lightning": ddss_lightning.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(path: Path, title: str, table: str, result: dict[str, Any]) -> None:
    """Write `path`.md (title, table, how it was measured) and `path`.json, and print the former."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = [f"- {name}: {result[name]}" for name in ("command", *environment())]
    text = "\n".join([f"# {title}", "", table, "", *notes, ""])
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(text)
