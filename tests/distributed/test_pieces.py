"""The rectangles of a sharded parameter hold the elements that they say, on every rank and mesh.

Ranks are pretended, one after another in this process: no element has to travel for its place.
"""

import contextlib
import inspect
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from zofo_kernels import Direction, Shift, Weights, perturb_, update_
from zofo_optim import HybridZOFO, Listener
from zofo_optim.sharding import Placed, check_model, fill, is_sharded, local_of, pieces_of

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

RANKS = 4
MESHES = [(4,), (2, 2), (1, 4), (4, 1)]


@contextlib.contextmanager
def as_rank(rank):
    """This process is one of four, who hear nothing of each other."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def numbered(shape, dtype=torch.float64):
    return torch.arange(math.prod(shape), dtype=dtype).reshape(shape)


def elements_of(piece):
    """Indices of a piece's elements in the full parameter, by its own account."""
    size = piece.tensor.numel()
    length, stride = piece.rectangle or (max(size, 1), max(size, 1))
    assert size % length == 0
    return [piece.offset + row * stride + k for row in range(size // length) for k in range(length)]


def check_pieces(parameter):
    """Of one whose elements are their own numbers."""
    held = []
    for piece in pieces_of(parameter):
        assert piece.tensor.flatten().tolist() == elements_of(piece)
        held += elements_of(piece)
    assert held == local_of(parameter).flatten().tolist()
    return held


def divided(tensor, mesh, placements):
    """A DTensor of what each process has whole; torch 2.6 has one of them send it to the others."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    local = tensor
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts, own = local.chunk(mesh.size(axis), placement.dim), mesh.get_local_rank(axis)
            local = parts[own] if own < len(parts) else local.narrow(placement.dim, 0, 0)
    like = dict(shape=tensor.shape, stride=tensor.stride(), run_check=False)
    return DTensor.from_local(local.clone().contiguous(), mesh, placements, **like)


@st.composite
def layouts(draw):
    """A shape, a mesh, and a placement for each of the mesh's dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    mesh = draw(st.sampled_from(MESHES))
    placement = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    return shape, mesh, tuple(draw(placement) for _ in mesh)


@settings(max_examples=60)
@given(layouts())
def test_pieces_are_where_they_say_for_every_placement(layout):
    shape, sizes, placements = layout
    owners = {}
    for rank in range(RANKS):
        with as_rank(rank):
            mesh = init_device_mesh("cpu", sizes)
            spread = divided(numbered(shape), mesh, placements)
            for element in check_pieces(spread):
                owners.setdefault(element, []).append(rank)
    copies = math.prod(
        size for size, placement in zip(sizes, placements, strict=True) if placement == Replicate()
    )
    assert sorted(owners) == list(range(math.prod(shape)))
    assert {len(ranks) for ranks in owners.values()} == {copies}


@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),), (Shard(0), Shard(1))])
def test_shards_of_matrices_are_one_piece(placements):
    for rank in range(RANKS):
        with as_rank(rank):
            mesh = init_device_mesh("cpu", (4,) if len(placements) == 1 else (2, 2))
            spread = divided(numbered((9, 7)), mesh, placements)
            assert len(pieces_of(spread)) == 1


def test_a_block_of_four_dimensions_is_as_few_pieces_as_there_can_be():
    with as_rank(3):
        mesh = init_device_mesh("cpu", (2, 2))
        spread = divided(numbered((4, 3, 4, 5)), mesh, [Shard(0), Shard(2)])
        pieces = pieces_of(spread)
    # half of dimensions 0 and 2: rows of (2, 5) at a distance of 20, six in a row
    assert [(p.offset, p.rectangle, p.tensor.numel()) for p in pieces] == [(130, (10, 20), 60)]
    with as_rank(3):
        mesh = init_device_mesh("cpu", (2, 2))
        spread = divided(numbered((3, 4, 4, 5)), mesh, [Shard(1), Shard(2)])
        pieces = pieces_of(spread)
    # rows at one distance within each of dimension 0 only
    assert [(p.offset, p.rectangle) for p in pieces] == [(50 + 80 * k, (10, 20)) for k in range(3)]


def test_ranks_without_rows_hold_an_empty_piece():
    with as_rank(3):
        mesh = init_device_mesh("cpu", (4,))
        spread = divided(numbered((2, 5)), mesh, [Shard(0)])
        (piece,) = pieces_of(spread)
        assert piece.tensor.numel() == 0
        Placed([spread], [0]).weights.layout()  # the kernels skip it


def test_partial_sums_are_refused_by_name():
    with as_rank(0):
        mesh = init_device_mesh("cpu", (4,))
        spread = DTensor.from_local(torch.zeros(4), mesh, [Partial()])
        with pytest.raises(
            ValueError, match=r"bias must be replicated .* got placements \(Partial"
        ):
            pieces_of(spread, "bias")


@pytest.mark.parametrize("shape", [(), (6, 3)])
def test_each_process_takes_its_part_of_a_whole(shape):
    whole = numbered(shape) + 1
    for rank in range(RANKS):
        with as_rank(rank), warnings.catch_warnings():
            warnings.simplefilter("error")
            placements = [Shard(0) if shape else Replicate()]
            mesh = init_device_mesh("cpu", (4,))
            expected = divided(whole, mesh, placements)
            spread = divided(0 * whole, mesh, placements)
            fill(spread, whole)
            assert torch.equal(local_of(spread), local_of(expected))


def test_the_model_is_needed_where_a_module_may_gather(monkeypatch):
    """Once there is one in the process: shards look as those of tensor parallelism."""
    kind = type("FSDPModule", (torch.nn.Module,), {})
    monkeypatch.setattr(torch.distributed.fsdp, "FSDPModule", kind)
    with as_rank(0):
        mesh = init_device_mesh("cpu", (4,))
        spread = divided(numbered((4,)), mesh, [Shard(0)])
        check_model(None, [spread])
        sharded = type("FSDPLinear", (kind,), {})
        check_model(sharded(), [spread])
        check_model(None, [numbered((4,))])
        with pytest.raises(ValueError, match=r"got a list with 1 DTensors.* copied or unpickled"):
            check_model(None, [spread])


class Recorded(Listener):
    def __init__(self, found):
        self.found = found

    def moved(self, move):
        self.found.append("move")

    def updated(self, updates):
        self.found.append("update")


@pytest.mark.parametrize("kind", ["cpu", "accelerator"])
def test_moves_wait_for_an_accelerator_that_reads_shards_from_the_host(monkeypatch, kind):
    """It reads them when its queue comes to that."""
    found = []
    stream = SimpleNamespace(synchronize=lambda: found.append("wait"))
    modules = {"accelerator": SimpleNamespace(current_stream=lambda: stream)}
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        holder, mesh = torch.nn.Module(), init_device_mesh("cpu", (1,))
        holder.p = torch.nn.Parameter(distribute_tensor(numbered((4,)), mesh, [Shard(0)]))
        groups = [dict(params=[holder.p], mode="zo", lr=0.1)]
        optimizer = HybridZOFO(groups, restore_buffers=holder)
        optimizer.add_listener(Recorded(found))
        # torch 2.6 has it in each mesh
        holds = DeviceMesh if hasattr(DeviceMesh, "device_type") else holder.p.device_mesh
        monkeypatch.setattr(holds, "device_type", kind)
        monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
        optimizer.step(lambda: float(local_of(holder.p).sum()))
    finally:
        dist.destroy_process_group()
    written = [before for before, event in itertools.pairwise(found) if event != "wait"]
    assert [event for event in found if event != "wait"] == ["move", "move", "update"]
    assert ("wait" in found) == (kind != "cpu")
    if kind != "cpu":
        assert written == ["wait"] * 3


def test_plain_tensors_are_one_piece():
    plain = torch.zeros(3, 4)
    assert not is_sharded(plain)
    assert local_of(plain) is plain
    assert pieces_of(plain) == [(plain, 0, None)]


# ---- passes over them -------------------------------------------------------------------------


def passes(w, backend, rank, distribution):
    """What an in-place step does to weights, and a copy that a streamed one would take."""
    direction = Direction(5, 3, 0, distribution, rank=rank)
    perturb_(w, direction, 0.25, backend=backend)
    perturb_(w, direction, -0.25, recover=Shift(direction, 0.25), backend=backend)
    update_(
        w,
        [direction, direction._replace(sample=1)],
        torch.tensor([0.75, -0.5]),
        0.003,
        weight_decay=0.1,
        recover=Shift(direction, -0.25),
        backend=backend,
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("placements", [[Shard(0), Shard(1)], [Shard(1), Shard(2)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_over_shards_are_those_over_the_whole(backend, rank, placements, dtype):
    shape = (6, 10, 4)[: 2 + (Shard(2) in placements)]
    full = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for distribution in ("gaussian", "rademacher"):
        whole = full.clone()
        passes(Weights([whole], [3]), backend, rank, distribution)
        assert not torch.equal(whole, full)
        for process in range(RANKS):
            with as_rank(process):
                mesh = init_device_mesh("cpu", (2, 2))
                mine = divided(full, mesh, placements)
                expected = divided(whole, mesh, placements)
                passes(Placed([mine], [3]).weights, backend, rank, distribution)
            assert same_bits(local_of(mine), local_of(expected))
