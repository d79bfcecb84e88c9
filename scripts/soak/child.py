"""The server as a child process: its start, its memory, its metrics, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from measurement import MistakeError

from tinyllm.hub import resolve

__all__ = ["Child"]

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
START_SECONDS = 180.0


class Child:
    """`python -m tinyllm serve`, on a free port."""

    def __init__(self, model: str, options: list[str], folder: Path) -> None:
        self._log = (folder / "server.log").open("w+b")
        command = [
            sys.executable,
            "-m",
            "tinyllm",
            "serve",
            "--model",
            str(_with_template(model, folder)),
            "--port",
            "0",
        ]
        self._process = subprocess.Popen([*command, *options], stdout=self._log, stderr=self._log)
        self.pid = self._process.pid
        self.host, self.port = self._address()

    def _address(self) -> tuple[str, int]:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.alive:
            found = re.search(r"http://([\d.]+):(\d+)", self.log)
            if found:
                return found[1], int(found[2])
            time.sleep(0.05)
        self.kill()
        raise MistakeError(f"the server does not start: {self.log.strip()[-500:]}")

    @property
    def log(self) -> str:
        """All that it has written."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def memory_mb(self) -> float:
        """Its resident memory in MB (1e6 bytes)."""
        if sys.platform == "linux":
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024 / 1e6

    def num_files(self) -> int | None:
        """How many files and sockets it has open, where the system says."""
        folder = Path(f"/proc/{self.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else None

    def terminate(self) -> None:
        """Asks it to finish what runs, and end."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        if self.alive:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _with_template(model: str, folder: Path) -> Path:
    """The model's path; of a folder without a chat template, a copy by links that has one, so that it can chat."""
    path = resolve(model)
    if not path.is_dir() or (path / "chat_template.jinja").exists():
        return path
    config = path / "tokenizer_config.json"
    if config.exists() and "chat_template" in json.loads(config.read_text()):
        return path
    copy = folder / (Path(model).name or "model")
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return copy
