"""A Ray that has ended stays ended."""

import subprocess
import sys

PROGRAM = """
from octavo.launch import serve
from octavo.launch.config import ServeConfig

class Supervisor:
    def __init__(self, *arguments, **options): pass
    def start(self): raise KeyboardInterrupt
    def stop(self, hurry): pass

serve.Supervisor = Supervisor
serve.run_server(ServeConfig())
import ray
try:
    ray.get_actor("what a thread asks for that still rebuilds a group")
except ray.exceptions.RaySystemError as error:
    print("refused:", error)
print("started" if ray.is_initialized() else "not started")
"""


def test_a_call_after_the_end_starts_no_other():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "refused: " in run.stdout
    assert "not started" in run.stdout
