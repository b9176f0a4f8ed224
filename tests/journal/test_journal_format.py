"""The journal's file: what goes in comes out, and damage is found."""

import itertools
import random

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from journaled import Job

from zofo_optim import Journal, replay
from zofo_optim.journal import JournalError, read
from zofo_optim.journal.format import Chain, Part, decode_header, decode_records, encode_header

STEPS = 8
single = st.floats(width=32, allow_nan=False)
number = st.floats(allow_nan=False)
seed = st.integers(0, 2**64 - 1)


COUNT = 11
"""Parameters of a group: more than a byte of bits."""
some = st.sets(st.integers(0, COUNT - 1), max_size=COUNT - 1).map(lambda s: tuple(sorted(s)))


def part(coefficient):
    return st.builds(
        Part,
        step=st.integers(0, 2**63),
        seed=seed,
        path=st.lists(st.tuples(st.integers(0, 2**32 - 1), number), max_size=3).map(tuple),
        coefficients=st.lists(coefficient, max_size=3).map(tuple),
        lr=coefficient,
        weight_decay=number,
        active=st.none() | some,
    )


step = st.tuples(part(single), part(number))  # the second group has float64 weights
event = st.dictionaries(st.text(), st.integers() | st.text())


@given(st.lists(step | event, max_size=12), seed)
def test_what_goes_in_comes_out(records, first_seed):
    names = [str(i) for i in range(COUNT)]
    groups = [dict(float64=wide, step=5, seed=first_seed, names=names) for wide in (False, True)]
    header = dict(groups=groups, num_samples=2)
    data, crc = encode_header(header)
    chain = Chain(header, crc)
    for record in records:
        data += chain.event(record) if isinstance(record, dict) else chain.step(record)
    found, first, again = decode_header(data, "x")
    assert (found, again) == (header, crc)
    decoded = list(decode_records(data, first, Chain(found, crc)))
    assert [r.event if r.event is not None else r.parts for r in decoded] == records
    assert not decoded or decoded[-1].end == len(data)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A job, and the bytes of its closed journal."""
    path = tmp_path_factory.mktemp("journal") / "run.zofo"
    job = Job(perturbation="streamed")
    weights = [{name: p.clone() for name, p in job.weights().items()}]
    with Journal(path, metadata={"about": "x" * 100}).attach(job.optimizer):
        for i in range(STEPS):
            job.step(i)
            weights.append({name: p.clone() for name, p in job.weights().items()})
    job.after = weights
    return job, path.read_bytes()


def attempt(job, path):
    """Replay as far as possible; weights are those of the step that it states."""
    base = {name: p.clone() for name, p in job.base.items()}
    with pytest.warns(UserWarning, match=r"replaying up to step \d"):
        result = replay(base, path, partial=True)
    for name, p in job.after[result.stop].items():
        assert same_bits(base[name], p)
    return result.stop


def test_cut_anywhere(sound, tmp_path):
    job, data = sound
    path = tmp_path / "cut.zofo"
    path.write_bytes(data)
    first, ends = read(path).first, [record.end for record in read(path).records]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        base = {name: p.clone() for name, p in job.base.items()}
        with pytest.raises(JournalError) as caught:
            replay(base, path)
        for name, p in job.base.items():
            assert same_bits(base[name], p)
        if cut < first:
            assert "within its header" in str(caught.value) or "no journal" in str(caught.value)
            continue
        whole = sum(end <= cut for end in ends)
        assert f"step {min(whole, STEPS)}" in str(caught.value)
        if cut in (first, *ends):
            assert "was not closed" in str(caught.value)
        assert attempt(job, path) == min(whole, STEPS)
        assert replay(base, path, stop=min(whole, STEPS)).stop == min(whole, STEPS)


def test_flipped_bits(sound, tmp_path):
    """Any single bit: everything before its record is still replayed, nothing from there on."""
    job, data = sound
    path = tmp_path / "flipped.zofo"
    path.write_bytes(data)
    first, ends = read(path).first, [record.end for record in read(path).records]
    bits = list(range(8 * first, 8 * len(data)))
    for bit in random.Random(1).sample(bits, 300):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        whole = sum(end <= bit // 8 for end in ends)
        assert read(path).stop == min(whole, STEPS)
        assert not read(path).closed
        assert attempt(job, path) == min(whole, STEPS)
    for bit in random.Random(2).sample(range(8 * first), 100):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(JournalError, match=r"no journal|version|header"):
            read(path)


def test_records_exchanged_left_out_or_repeated(sound, tmp_path):
    job, data = sound
    path = tmp_path / "mixed.zofo"
    path.write_bytes(data)
    recording = read(path)
    marks = [recording.first, *(record.end for record in recording.records)]
    pieces = [data[a:b] for a, b in itertools.pairwise(marks)]
    head = data[: recording.first]
    for order in ([0, 1, 3, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 2, 3]):
        path.write_bytes(head + b"".join(pieces[i] for i in order))
        agreed = next(i for i, j in enumerate(order) if i != j)
        assert attempt(job, path) == agreed


def test_something_appended(sound, tmp_path):
    job, data = sound
    path = tmp_path / "longer.zofo"
    path.write_bytes(data + b"\0")
    with pytest.raises(JournalError, match=f"damaged after step {STEPS}"):
        replay(job.base, path)


def test_records_of_another_journal(sound, tmp_path):
    """Two runs from the same header differ in their checksums."""
    _, data = sound
    other = Job(perturbation="streamed", seed=4)
    path = tmp_path / "other.zofo"
    with Journal(path).attach(other.optimizer):
        for i in range(STEPS):
            other.step(i)
    theirs = read(path)
    body = path.read_bytes()[theirs.first :]
    path.write_bytes(data)
    ours = read(path)
    path.write_bytes(data[: ours.first] + body)
    assert read(path).stop == 0


def test_not_a_journal(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({}, path)
    with pytest.raises(JournalError, match="is no journal"):
        read(path)
    path.write_bytes(b"ZOFOJRN2 and more")
    with pytest.raises(JournalError, match="another format version"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(JournalError, match="is no journal"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")
