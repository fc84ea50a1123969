"""Every test: no network, one thread. Set here so that the processes which tests start have it too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"
