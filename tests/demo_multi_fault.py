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

fault, module = sys.argv[1:3]
load = NodeLoader._load


def load_or_fail(self: NodeLoader, *arguments: Any) -> Any:
    if self.rank == 1 and self.shuffle and self.epoch > 2:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this process has had enough")
    return load(self, *arguments)


NodeLoader._load = load_or_fail

if __name__ == "__main__":
    sys.exit(main(import_module(f"demo_multi.{module}").train, sys.argv[3:], framework="", command_line=command_line()))
