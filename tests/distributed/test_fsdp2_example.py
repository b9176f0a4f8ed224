"""The example of shards, under torchrun."""

import re

from launch import ROOT, torchrun


def test_the_example_trains_on_two_ranks_and_each_holds_half(tmp_path):
    done = torchrun(ROOT / "examples" / "fsdp2.py", 2, env={"TMPDIR": str(tmp_path)})
    first, last = map(float, re.search(r"2 processes, loss (\S+) -> (\S+)", done.stdout).groups())
    assert last < 0.8 * first
    held, whole = re.search(r"the first holds (\S+) of (\S+) weights", done.stdout).groups()
    assert int(whole.replace(",", "")) == 2 * int(held.replace(",", ""))
