"""Run a command with a real Valkey, for the gateways that the JavaScript client's tests start.

python tests/clients/run.py node --test clients/js/test/*.test.js
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.gateways import JWT_SECRET, TABLE_SECRET, valkey


def main(command: list[str]) -> int:
    with valkey() as server:
        env = {
            **os.environ,
            "TEST_REDIS_URL": server.connection_url,
            "TEST_PYTHON": sys.executable,
            "TEST_JWT_SECRET": JWT_SECRET,
            "TEST_TABLE_SECRET": TABLE_SECRET,
        }
        return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
