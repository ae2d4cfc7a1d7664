"""Wall time of `conclave --help`, the median of several fresh processes. One JSON object with --json."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

RUNS = 9


def main() -> None:
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "conclave", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"command": "conclave --help", "median_seconds": round(statistics.median(seconds), 3)}))


if __name__ == "__main__":
    main()
