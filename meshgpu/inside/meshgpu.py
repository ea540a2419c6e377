"""What a job may import: `meshgpu.log(step=…, loss=…)` reports numbers to the mesh, and does nothing anywhere else.

A file of its own, put on the job's import path, for any Python from 3.8 on; standard library only.
"""

import json
import math
import os
from pkgutil import extend_path

__path__ = extend_path([], __name__)  # type: ignore[var-annotated]  # Python 3.8. Where meshgpu itself is installed, its modules can still be imported

FILE_VARIABLE = "MESHGPU_METRICS"


def log(step=None, **values):  # type: ignore[no-untyped-def]  # numbers of any library: float() decides
    """Report numbers, as `log(step=10, loss=0.3)`. What is no finite number is left out; training never fails here."""
    path = os.environ.get(FILE_VARIABLE)
    if not path:
        return
    line = {}
    for name, value in values.items():
        try:
            number = float(value)
        except Exception:  # noqa: S112  # a tensor with a gradient, an array, None: never the job's end
            continue
        if math.isfinite(number):
            line[name] = number
    try:
        if line:
            if step is not None:
                line["step"] = int(step)
            with open(path, "a") as file:  # noqa: PTH123  # one line, one write: threads and processes may share it
                file.write(json.dumps(line) + "\n")
    except Exception:  # a full disk must not end a training run
        return
