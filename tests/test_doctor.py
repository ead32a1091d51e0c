"""What the doctor says about devices and backends."""

import os
import sys

import fake_engine
import pytest
import torch

from cellformers import doctor
from cellformers.doctor import Finding, examine, report
from cellformers.models import devices


def backends():
    findings = doctor._backends()
    return findings, report(findings)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings, text = backends()
    assert "attention backend sdpa" in text
    assert "backend te: for a GPU" in text
    assert "no fp8" in text
    assert "auto takes on cpu: sdpa for bf16, sdpa for fp32" in text
    assert not any(finding.state == "missing" for finding in findings)
    assert "pip install" not in text


def test_with_a_gpu_and_te(monkeypatch):
    fake_engine.pretend_gpu(monkeypatch)
    fake_engine.install(monkeypatch)
    findings, text = backends()
    assert Finding("ok", "attention backend te") in findings
    assert "compute capability 9.0" in text
    assert "fp8 works" in text
    assert "auto takes on cuda: te for bf16, sdpa for fp32" in text


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "pytorch,core-cu13"), ("12.8", "pytorch,core-cu12")])
def test_how_to_get_te(monkeypatch, cuda, extra):
    fake_engine.pretend_gpu(monkeypatch, (8, 0))
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.delitem(sys.modules, "cellformers.models.te", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    _, text = backends()
    assert f"pip install --no-build-isolation 'transformer_engine[{extra}]'" in text
    assert "8.9 and above, this one has 8.0" in text
    assert "auto takes on cuda: varlen for bf16, sdpa for fp32" in text


def test_an_old_torch_is_told_how_to_get_varlen(monkeypatch):
    from cellformers.models import attention

    fake_engine.pretend_gpu(monkeypatch)
    fake_engine.install(monkeypatch)
    monkeypatch.setattr(attention, "VARLEN", "torch.nn.attention.nothing")
    _, text = backends()
    assert "install torch 2.10 or later" in text


def test_gpus_are_free_or_claimed(monkeypatch, tmp_path):
    gpus = [devices.Gpu(index, f"uuid-{index}", "NVIDIA H200", 140 << 30) for index in range(2)]
    monkeypatch.setattr(devices, "FOLDER", tmp_path / "claims")
    monkeypatch.setattr(devices, "_claims", {})
    monkeypatch.setattr(devices, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "nvml_free_memory", lambda: {"uuid-0": 12 << 30, "uuid-1": 139 << 30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices.claim(gpus[:1], 1, {})
    text = report(doctor._devices())
    assert "GPU 0: NVIDIA H200, 140 GiB, 12 GiB free, claimed by process " + str(os.getpid()) in text
    assert "GPU 1: NVIDIA H200, 140 GiB, 139 GiB free, free to claim" in text


def test_the_whole_examination_goes_through():
    findings = examine()
    assert {finding.state for finding in findings} <= {"ok", "note", "missing"}
    assert any("working folder" in finding.what for finding in findings)
