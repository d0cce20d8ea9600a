"""What every test file shares: the GPU marker, one torch thread for each test worker."""

import pytest
import torch

torch.set_num_threads(1)  # the workers already use every core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
