"""The base model and the adapters of `adapter_models`, made once."""

import pytest
import torch
from adapter_models import make_base, save_adapter


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, base_folder):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "law", base_folder, seed=1)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory, base_folder):
    """Three adapters for three tasks, of one shape."""
    above = tmp_path_factory.mktemp("adapters")
    return [save_adapter(above / name, base_folder, seed) for seed, name in enumerate(("law", "news", "code"), start=1)]


@pytest.fixture()
def base():
    return make_base()


@pytest.fixture()
def tokens():
    torch.manual_seed(7)
    return torch.randint(0, 96, (4, 12))
