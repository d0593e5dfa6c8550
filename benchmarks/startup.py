"""`octavo bench startup`: from the command to a system that takes requests, stage by stage."""

import time

from ..launch.config import ServeConfig
from .report import Report
from .system import running_system


def run_startup(config: ServeConfig, report: Report) -> None:
    """Adds the table `Start to ready` to the report. Stages may overlap, so that their times need not add up."""
    started = time.perf_counter()
    with running_system(config) as system:
        total_s = time.perf_counter() - started
    for stage in system.stages:
        report.add("Start to ready", {"stage": stage.name, "what": stage.detail, "s": stage.duration_s})
    report.add("Start to ready", {"stage": "total", "what": "", "s": total_s})
