"""Serves an emulated Google Cloud until it is interrupted: `python -m tests.cloud [boot=20 ...]`.

What it prints are the variables to export; then `cloudrun main.py` in another terminal runs on it.
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

BUCKET = "my-bucket"


def main() -> None:
    options = {name: float(value) for name, _, value in (word.partition("=") for word in sys.argv[1:])}
    if reason := unavailable():
        print(f"# without machines: {reason}", flush=True)
    place = tempfile.gettempdir() if reason else disk_root()
    with (
        tempfile.TemporaryDirectory(dir=place, prefix="cloud-") as folder,
        Storage() as storage,
        Cloud(Path(folder), timing=Timing(**options), machines=not reason) as cloud,
    ):
        storage.create_bucket(BUCKET)
        settings = {
            **cloud.environ(),
            "STORAGE_EMULATOR_HOST": storage.url,
            "GCS_DIR": f"gs://{BUCKET}/runs",
            "CLOUDRUN_BACKEND": "gcp",
            "VM_GPU": "L4",
        }
        for name, value in settings.items():
            print(f"export {name}={value}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        with suppress(KeyboardInterrupt):
            signal.pause()
        print(f"# violations: {cloud.violations}", flush=True)


if __name__ == "__main__":
    main()
