"""What nodes and servers both tell their machine's monitoring: release, programs, certificates, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from conclave.base.errors import BadInputError
from conclave.deployment.flower.runtime import installed_version
from conclave.deployment.host.certificates import days_left


def machine_metrics(programs: Mapping[str, bool], certificates: Iterable[Path], folder: Path) -> Iterator[Metric]:
    """Yield what does not depend on any data.

    Args:
        programs: name → whether it runs.
        certificates: one that cannot be read is left out.
        folder: on the disk whose free space is reported.
    """
    info = GaugeMetricFamily("conclave_info", "Always 1; the installed release.", labels=["release"])
    info.add_metric([installed_version()], 1.0)
    yield info
    up = GaugeMetricFamily("conclave_program_up", "Whether a program runs.", labels=["program"])
    for name, runs in programs.items():
        up.add_metric([name], float(runs))
    yield up
    days = GaugeMetricFamily("conclave_certificate_days", "Days until a certificate runs out.", labels=["file"])
    for path in certificates:
        try:
            days.add_metric([path.name], round(days_left(path), 2))
        except BadInputError:
            continue
    yield days
    free = GaugeMetricFamily("conclave_disk_free_bytes", "Free space where the state lies.")
    free.add_metric([], float(shutil.disk_usage(folder).free))
    yield free
