"""The resident size of this process and its highest point; imports nothing that a contestant does not."""

import os
import threading

_PAGE = os.sysconf("SC_PAGE_SIZE")
_INTERVAL = 0.005


def resident_bytes() -> int:
    """Resident size of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


class PeakSampler:
    """Highest resident size between `start` and `stop`."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.peak = max(self.peak, resident_bytes())

    def start(self) -> None:
        """Begin."""
        self.peak = resident_bytes()
        self._thread.start()

    def stop(self) -> int:
        """End.

        Returns:
            the peak in bytes.
        """
        self._stop.set()
        self._thread.join()
        return self.peak
