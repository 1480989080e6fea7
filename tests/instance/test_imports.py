"""What an instance needs to be installed."""

import subprocess
import sys


def test_an_instance_on_the_cpu_does_without_triton() -> None:
    """There is none for macOS."""
    program = "import sys; sys.modules['triton'] = None; import instance.__main__"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
