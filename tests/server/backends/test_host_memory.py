"""Memory that is kept, and memory that comes back."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import numpy as np
import psutil
from gradwire_server.backends import host_memory as memory

if sys.argv[1] == "keep":
    assert memory.tune_malloc()
process = psutil.Process()
MIB = 1 << 20
resident = [process.memory_info().rss // MIB]
array = np.ones(100 * MIB, np.uint8)
resident.append(process.memory_info().rss // MIB)
del array
resident.append(process.memory_info().rss // MIB)
memory.trim_malloc()
resident.append(process.memory_info().rss // MIB)
print(json.dumps(resident))
"""


def resident_mib(keep):
    command = [sys.executable, "-c", PROGRAM, keep]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_freed_memory_is_kept_until_it_is_given_back():
    before, full, freed, given_back = resident_mib("keep")
    assert full - before >= 99
    assert freed - before >= 90
    assert given_back - before <= 10


def test_without_that_freed_memory_goes_back_at_once():
    before, full, freed, _ = resident_mib("as it is")
    assert full - before >= 99
    assert freed - before <= 10
