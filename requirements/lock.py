"""Write requirements/cpu.lock: what cpu.txt pins, with the digest of the file that pip chooses (x86-64, Python 3.11).

pip install --dry-run --ignore-installed --no-deps --report report.json -r requirements/cpu.txt
python requirements/lock.py report.json > requirements/cpu.lock
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HEADER = """\
# requirements/cpu.txt with the digest of every file; made by requirements/lock.py.
# pip install --no-deps --require-hashes -r requirements/cpu.lock
"""


def main() -> None:
    """Print the list."""
    found = {}
    for item in json.loads(Path(sys.argv[1]).read_text())["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        version = item["metadata"]["version"].partition("+")[0]  # a CPU build of torch is torch, from another index
        found[name] = f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"
    print(HEADER + "\n".join(found[name] for name in sorted(found)))


if __name__ == "__main__":
    main()
