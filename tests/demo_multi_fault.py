"""A demo in several processes, one of which comes to grief: run as ``demo_multi_fault.py FAULT MODULE OPTIONS``.

Processes that are spawned run this file as well, up to the last lines.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.training import main
from demo_multi.shares import command_line
from gglspeedup import NodeLoader

gather = NodeLoader._gather


def gather_or_fail(self: NodeLoader, *arguments: Any) -> Any:
    if self.rank == 1 and self.shuffle and self.epoch > 2:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this process has had enough")
    return gather(self, *arguments)


if __name__ in ("__main__", "__mp_main__"):  # the latter where it was spawned; collected by pytest it does nothing
    NodeLoader._gather = gather_or_fail

if __name__ == "__main__":
    demo = import_module(f"demo_multi.{sys.argv[2]}")
    sys.exit(main(demo.train, sys.argv[3:], framework="", command_line=command_line()))
