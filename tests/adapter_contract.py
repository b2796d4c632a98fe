"""What every adapter must do, run for one framework in a process of its own: one line of JSON an operation.

    python tests/adapter_contract.py torch

`test_adapters.py` runs it and makes a test of each line.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings

import adapter_calls
import adapter_memory
from adapter_kit import FRAMEWORK, OPERATIONS

PARTS = (adapter_calls, adapter_memory)  # importing them registers their operations


def main() -> None:
    FRAMEWORK.name = sys.argv[1]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=ImportWarning)  # what a framework's import hook says of others' modules
    for name, (function, only) in OPERATIONS.items():
        if FRAMEWORK.name not in only:
            continue
        began = time.perf_counter()
        try:
            function()
            outcome = "passed"
        except ModuleNotFoundError as error:
            outcome = f"missing {error.name}" if error.name in ("ml_dtypes", "psutil") else traceback.format_exc()
        except Exception:
            outcome = traceback.format_exc()
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"operation": name, "outcome": outcome, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
