"""This script runs benchmarks/kernels/kernel_static.py: scripts elsewhere call it by this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python puts the script's own folder there

from benchmarks.kernels.kernel_static import main

if __name__ == "__main__":
    main()
