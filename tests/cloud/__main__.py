"""Serves an emulated cloud until it is interrupted: `python -m tests.cloud [gcp|vast] [boot=20 ...]`.

What it prints are the variables to export; then `cloudrun main.py` in another terminal runs on it. A
storage is always there, and Google Cloud where nothing is said.
"""

import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from .compute import Cloud
from .machines import disk_root, unavailable
from .project import Timing
from .storage import Storage
from .vast import Vast
from .vast_account import VastTiming

BUCKET = "my-bucket"
CLOUDS = {
    "gcp": (Cloud, Timing, {"CLOUDRUN_BACKEND": "gcp", "VM_GPU": "L4"}),
    "vast": (Vast, VastTiming, {"CLOUDRUN_BACKEND": "vast", "VM_GPU": "'RTX 4090'"}),
}


def main() -> None:
    words = sys.argv[1:]
    kind, timing, chosen = CLOUDS[words.pop(0) if words and words[0] in CLOUDS else "gcp"]
    options = {name: float(value) for name, _, value in (word.partition("=") for word in words)}
    if reason := unavailable():
        print(f"# without machines: {reason}", flush=True)
    place = tempfile.gettempdir() if reason else disk_root()
    with (
        tempfile.TemporaryDirectory(dir=place, prefix="cloud-") as folder,
        Storage() as storage,
        kind(Path(folder), timing=timing(**options), machines=not reason) as cloud,
    ):
        storage.create_bucket(BUCKET)
        settings = {
            **cloud.environ(),
            "STORAGE_EMULATOR_HOST": storage.url,
            "GCS_DIR": f"gs://{BUCKET}/runs",
            **chosen,
        }
        for name, value in settings.items():
            print(f"export {name}={value}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        with suppress(KeyboardInterrupt):
            signal.pause()
        print(f"# violations: {cloud.violations}", flush=True)


if __name__ == "__main__":
    main()
