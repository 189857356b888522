"""Settings for all tests."""

import torch

# Tiny networks gain nothing from a second thread, and lose much where tests run side by side.
torch.set_num_threads(1)
