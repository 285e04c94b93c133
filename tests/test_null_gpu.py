"""`null_gpu.py` says in one sentence why it cannot work, and what it generates answers for each function once."""
from __future__ import annotations

import re
import shutil
import sys

import pytest
import torch

from conftest import REPO

sys.path.insert(0, str(REPO / "tests"))
import null_gpu


def refusal() -> str:
    """What it exits with; a process that it started would be a mistake."""
    said = null_gpu.main(["train_gpt.py"])
    assert re.fullmatch(r"null_gpu: .*[^.]\.", said)
    return said


def test_it_refuses_in_one_sentence(monkeypatch, tmp_path):
    """No CUDA build, a real GPU, missing tools; without arguments it shows its usage."""
    monkeypatch.delenv(null_gpu.MARK, raising=False)
    monkeypatch.setattr(null_gpu, "start", lambda arguments: pytest.fail("it was started"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert "NVIDIA H100 is a real GPU" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(null_gpu, "TRITON", tmp_path / "none")
    assert "gcc and nm and Triton must be installed" in refusal()
    assert null_gpu.main([]) == null_gpu.main(["-m"]) == null_gpu.__doc__


@pytest.mark.parametrize("name, code", [
    ("cudaStreamCreateWithPriority", "last += 64"), ("cublasLtMatmulDescCreate", "last += 64"),
    ("cuModuleLoadData", "last += 64"), ("cuOccupancyMaxActiveClusters", "= 4;"), ("cuDeviceGet", "= 0;"),
    ("cudaStreamIsCapturing", "*(int *)b = 0;"), ("cusolverDnDpotrf_bufferSize", "= 64;"),
    ("cudaLaunchKernel", ""), ("__cudaRegisterFatBinary", ""), ("cuLinkCreate_v2", "")])
def test_each_name_has_at_most_one_answer(name, code):
    """A name that the patterns know fits one of them only, and is one that is looked for."""
    found = [does for names, does in null_gpu.ANSWERS.items() if re.fullmatch(names, name)]
    assert null_gpu.WANTED.fullmatch(name) and len(found) == bool(code) and all(code in does for does in found)
    assert not null_gpu.WANTED.fullmatch("cuFileRead") and not null_gpu.WANTED.fullmatch("cudnnCreate")
