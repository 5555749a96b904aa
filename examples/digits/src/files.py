"""JSON files that are either the old or the new version, never half of one."""

import json
import os


def save(path, value):
    # The file may be copied, and the machine stopped, at any moment. The data must be on disk
    # before the new name is, and the rename is atomic only within one directory.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(temporary), str(path))
