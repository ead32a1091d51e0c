"""What the doctor says about devices and backends."""

import sys

import fake_engine
import pytest
import torch

from cellformers import doctor
from cellformers.doctor import Finding, examine, report


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


def test_the_whole_examination_goes_through():
    findings = examine()
    assert {finding.state for finding in findings} <= {"ok", "note", "missing"}
    assert any("working folder" in finding.what for finding in findings)
