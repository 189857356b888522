"""Runs a module as `python -m` does, and ends the process as soon as it is done.

The interpreter's own end is left out. Threads of gloo outlive `destroy_process_group` where torch's
caches hold a device mesh, and one that gives a tensor back while the interpreter ends aborts the
process: "terminate called without an active exception", seen where the machine is busy.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
