"""Jobs whose processes are killed: torchrun starts them anew, and nothing is lost."""

from pathlib import Path

import elastic_job
import pytest
import torch
from conftest import same_bits
from elastic_job import DISTURBANCES, STEPS, base_model, train
from launch import torchrun

from zofo_optim import replay
from zofo_optim.journal import read

SCRIPT = Path(elastic_job.__file__)
pytestmark = pytest.mark.filterwarnings("ignore:.* is cut at the optimizer's step")


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """Two processes, undisturbed; and with a failure in each start but the last."""
    folder = tmp_path_factory.mktemp("elastic")
    options = ("--max-restarts", len(DISTURBANCES), "--monitor-interval", 0.1)
    # else starts share a store, in which gloo may find the addresses of an earlier one
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun(SCRIPT, 2, folder, options=options, env=env)
    return folder


def test_a_job_that_is_killed_ends_with_the_same_weights(restarted):
    for rank in range(2):
        found = torch.load(restarted / f"disturbed.{rank}.pt")
        whole = torch.load(restarted / f"whole.{rank}.pt")
        assert (found["start"], found["begin"]) == (len(DISTURBANCES), 9)
        for name, p in base_model().state_dict().items():
            assert same_bits(found["weights"][name], whole["weights"][name])
            assert not same_bits(p, whole["weights"][name])


def test_its_journal_has_every_step_once(restarted):
    path = restarted / "disturbed" / "run.zofo"
    recording = read(path)
    assert recording.closed
    assert len(recording.steps) == recording.stop == STEPS
    assert path.read_bytes() == (restarted / "whole" / "run.zofo").read_bytes()


def test_another_number_of_processes_goes_on(restarted, tmp_path):
    """Two processes, of which one is killed; then this one alone."""
    failed = torchrun(SCRIPT, 2, tmp_path, "only", check=False)
    assert failed.returncode != 0
    assert "exitcode  : -9" in failed.stdout
    folder = tmp_path / "disturbed"
    assert not read(folder / "run.zofo").closed
    model, begin = train(folder)
    assert begin == 3
    for name, p in torch.load(restarted / "whole.0.pt")["weights"].items():
        torch.testing.assert_close(model.state_dict()[name], p, rtol=1e-9, atol=1e-11)
    again = base_model()
    assert replay(again, folder / "run.zofo").verified
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert same_bits(p, dict(again.named_parameters())[name])
