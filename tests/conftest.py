"""Set before torch is imported: one thread, so that results repeat bit for bit and two workers share two cores."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# What a machine may lack without a package of the extras being missing.
MACHINE = ("OUTLAST_DATA", "chromium", "OpenGL", "EGL", "CUDA", "GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With OUTLAST_STRICT set, a test that skips for another reason than the machine's fails: else a broken install stays green."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("OUTLAST_STRICT"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(word in reason for word in MACHINE):
            report.outcome, report.longrepr = "failed", f"skipped under OUTLAST_STRICT: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped and os.environ.get("OUTLAST_STRICT"):
        report.outcome, report.longrepr = "failed", f"skipped under OUTLAST_STRICT: {report.longrepr}"
    return report
