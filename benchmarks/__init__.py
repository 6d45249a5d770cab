import sys
from pathlib import Path

# From a checkout nothing has to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))
