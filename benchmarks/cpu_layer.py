"""This script runs benchmarks/kernels/cpu_layer.py: scripts elsewhere call it by this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python puts the script's own folder there

from benchmarks.kernels.cpu_layer import main

if __name__ == "__main__":
    sys.exit(main())
