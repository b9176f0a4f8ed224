"""Journals: what is recorded, replayed, resumed."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from conftest import same_bits
from journaled import Job
from torch import nn

from zofo_kernels import perturb_
from zofo_optim import HybridZOFO, Journal, replay
from zofo_optim.journal import JournalError, read
from zofo_optim.journal.format import Part, precise


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zofo"


def assert_replays(job, path, **options):
    """From the base, to the bit."""
    start = {name: p.clone() for name, p in job.base.items()}
    result = replay(start, path, **options)
    for name, p in job.weights().items():
        assert same_bits(start[name], p), name
    for name in set(start) - set(job.weights()):
        assert same_bits(start[name], job.base[name]), name
    return result


VARIANTS = [
    dict(zip(("perturbation", "distribution", "dtype"), values, strict=True))
    for values in itertools.product(
        ["in_place", "streamed"],
        ["gaussian", "rademacher"],
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    )
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("more", [dict(), dict(estimator="one_sided", num_samples=3)])
def test_replay_gives_the_trained_weights(variant, more, path):
    job = Job(**variant, **more)
    with Journal(path).attach(job.optimizer):
        for step in range(12):
            job.step(step)
    assert any(not same_bits(job.base[name], p) for name, p in job.weights().items())
    assert assert_replays(job, path) == (0, 12, True)


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_everything_that_can_happen_in_a_training(perturbation, path):
    """Accumulation, faults, bad losses, changed options, ascent: all is in the records."""
    job = Job(perturbation=perturbation)
    group = job.optimizer.param_groups[0]

    def broken(step):
        job.loss(step)
        if torch.is_grad_enabled():
            return job.loss(step)
        raise RuntimeError("data")

    with Journal(path).attach(job.optimizer) as journal:
        job.step(0)
        job.optimizer.zero_grad()
        for part in range(3):
            job.optimizer.backward(lambda part=part: job.loss(part))
        job.optimizer.step()
        job.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="data"):
            job.optimizer.step(lambda: broken(2))
        group["mu"] = 2e-3
        job.step(2)
        job.step(3, float("nan"))
        group["weight_decay"] = 0.0
        group["seed"] = 77
        job.step(4)
        group["maximize"] = True
        job.step(4, -1.0)
        group["maximize"] = False
        job.optimizer.backward(lambda: job.loss(5))
        job.optimizer.zero_grad()
        journal.stamp()
        job.step(5)
        group["zo_step"] = 1000
        job.step(6)
        with pytest.raises(RuntimeError, match="data"):
            job.optimizer.step(lambda: broken(7))
    assert job.optimizer.skipped_steps == 1
    assert assert_replays(job, path) == (0, 1001, True)


def test_several_groups(path):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(5, 5).requires_grad_(False) for _ in range(3)])
    layers[1].to(torch.float64)
    rates, mus = (1e-3, 1e-4, 1e-2), (1e-3, 1e-2, 1e-3)
    groups = [
        dict(
            mode="zo",
            lr=lr,
            mu=mu,
            params=list(layer.parameters()),
            param_names=[f"{i}.weight", f"{i}.bias"],
        )
        for i, (layer, lr, mu) in enumerate(zip(layers, rates, mus, strict=True))
    ]
    groups[2]["zo_step"] = 7
    base = {f"{i}.{n}": p.clone() for i, m in enumerate(layers) for n, p in m.named_parameters()}
    optimizer = HybridZOFO(groups)

    def loss():
        x = torch.ones(2, 5)
        for layer in layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x.square().sum()

    with Journal(path).attach(optimizer):
        for _ in range(5):
            optimizer.step(loss)
    assert replay(base, path) == (0, 5, True)
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            assert same_bits(base[f"{i}.{name}"], p)


def test_awkward_tensors_in_small_pieces(path, monkeypatch):
    """Not contiguous, empty, 0-dim; pieces end in the midst of tensors and of Philox calls."""
    monkeypatch.setattr("zofo_optim.journal.player.PIECE_STEPS", 1)
    monkeypatch.setattr("zofo_optim.journal.player.SMALLEST_PIECE", 100)
    torch.manual_seed(0)
    base = {
        "a": torch.randn(31, 17).t(),
        "b": torch.empty(0, 3),
        "c": torch.randn(()),
        "d": torch.randn(333).to(torch.bfloat16),
        "e": torch.randn(20, 20)[:, ::2],
    }
    tensors = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
        for name, t in base.items()
    }
    optimizer = HybridZOFO(list(tensors.items()), mode="zo", lr=1e-2, weight_decay=0.1)
    with Journal(path).attach(optimizer):
        for _ in range(4):
            optimizer.step(lambda: sum(t.float().square().sum() for t in tensors.values()))
    seen = []
    assert replay(base, path, progress=lambda *done: seen.append(done)).verified
    for name, t in tensors.items():
        assert same_bits(base[name], t)
    total = sum(t.numel() for t in tensors.values())
    assert seen[-1] == (total, total)
    assert len(seen) >= 12


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_rademacher_is_bit_identical_on_every_backend(perturbation, path, backend):
    job = Job(perturbation=perturbation, distribution="rademacher", dtype=torch.bfloat16)
    with Journal(path).attach(job.optimizer):
        for step in range(5):
            job.step(step)
    assert assert_replays(job, path, backend=backend).verified


def test_gaussian_on_another_backend_is_close_and_says_so(path):
    job = Job(perturbation="streamed")
    with Journal(path).attach(job.optimizer):
        for step in range(5):
            job.step(step)
    start = {name: p.clone() for name, p in job.base.items()}
    with pytest.warns(UserWarning, match=r"not bit-identical.*'cpu'.*'reference'"):
        assert replay(start, path, backend="reference").verified is False
    for name, p in job.weights().items():
        torch.testing.assert_close(start[name], p, rtol=1e-5, atol=1e-5)


def test_a_record_is_small(path):
    """Ten bytes a step; fourteen where the learning rate changes in every step."""
    job = Job()
    sizes = []
    with Journal(path).attach(job.optimizer):
        for step in range(101):
            job.step(0 if step < 51 else step)
            sizes.append(path.stat().st_size)
    assert sizes[50] - sizes[0] == 50 * 10
    assert sizes[100] - sizes[50] == 50 * 14


def test_a_long_training_of_a_large_model_is_small(path):
    """20,000 steps of Llama-7B, with a learning rate that changes in every step."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    named = dict(model.named_parameters())
    assert sum(p.numel() for p in named.values()) > 6.7e9
    small = [torch.zeros(2, dtype=torch.bfloat16) for _ in named]
    groups = [dict(params=small, param_names=list(named), mode="zo", lr=1e-3)]
    optimizer = HybridZOFO(groups)
    with Journal(path).attach(optimizer) as journal:
        chain, data = journal._chain, bytearray()
        for step in range(20_000):
            part = Part(step, 0, ((0, 1e-3), (0, -1e-3)), (float(step),), 1e-6 / (1 + step), 0.0)
            data += chain.step([dataclasses.replace(part, lr=precise(part.lr, wide=False))])
        journal._put(bytes(data))
        shapes = sum(len(str(list(p.shape))) for p in named.values())
    assert path.stat().st_size + shapes < 350_000


def test_records_reach_the_file_in_the_step(path):
    job = Job()
    Journal(path).attach(job.optimizer)
    for step in range(3):
        job.step(step)
        assert read(path).stop == step + 1


def test_start_and_stop(path):
    job = Job(perturbation="streamed")
    states = []
    with Journal(path).attach(job.optimizer):
        for step in range(6):
            states.append({name: p.clone() for name, p in job.weights().items()})
            job.step(step)
    states.append({name: p.clone() for name, p in job.weights().items()})
    for start, stop in itertools.combinations_with_replacement(range(7), 2):
        weights = {name: p.clone() for name, p in states[start].items()}
        result = replay(weights, path, start=start, stop=stop)
        assert result[:2] == (start, stop)
        assert result.verified is (True if stop in (0, 6) else None)
        for name, p in states[stop].items():
            assert same_bits(weights[name], p)
    for bad in (dict(start=3, stop=2), dict(stop=7), dict(start=-1), dict(stop=7, start=7)):
        with pytest.raises(JournalError, match="sound steps 0 to 6"):
            replay(states[0], path, **bad)
    with pytest.raises(TypeError, match="stop must be an int"):
        replay(states[0], path, stop=2.0)


# ---- the weights that it is applied to ------------------------------------------------------


@pytest.fixture
def trained(path):
    job = Job()
    with Journal(path, metadata={"base": "some/model"}).attach(job.optimizer):
        for step in range(3):
            job.step(step)
    return job


def refused(base, path, message, error=JournalError):
    before = {name: p.clone() for name, p in base.items()}
    with pytest.raises(error, match=message):
        replay(base, path)
    for name, p in base.items():
        assert same_bits(before[name], p)


def test_the_wrong_base_model(trained, path):
    trained.base["2.weight"][3, 4] += 1e-3
    refused(trained.base, path, r"1 of 4 zeroth-order parameters differ: 2.weight.*some/model")


def test_the_trained_weights_are_no_base(trained, path):
    refused(dict(trained.model.state_dict()), path, "4 of 4")


def test_another_dtype_shape_or_name(trained, path):
    base = trained.base
    refused({**base, "0.bias": base["0.bias"].double()}, path, "'0.bias' must have.*float32.*64")
    refused({**base, "0.bias": base["0.bias"][:3].clone()}, path, r"shape \(40,\).*\(3,\)")
    refused({n: p for n, p in base.items() if n[0] != "2"}, path, "2 are missing: 2.weight, 2.bias")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a mapping"):
        replay(list(base.values()), path)


def test_unchecked(trained, path):
    trained.base["2.weight"][3, 4] += 1e-3
    assert replay(trained.base, path, check=False).verified is None


def test_a_result_that_differs_is_an_error_for_rademacher(path, monkeypatch):
    job = Job(distribution="rademacher")
    with Journal(path).attach(job.optimizer):
        job.step(0)
        with torch.no_grad():
            job.model[0].bias.add_(1.0)  # behind the journal's back
    with pytest.raises(JournalError, match=r"did not give the weights that were trained: 0.bias"):
        replay(job.base, path)


def test_another_noise_version(trained, path, monkeypatch):
    monkeypatch.setattr("zofo_optim.journal.player.NOISE_VERSIONS", (1,))
    refused(trained.base, path, "noise version 2")


# ---- what cannot be recorded ----------------------------------------------------------------


def test_one_journal_one_optimizer(path, tmp_path):
    job, other = Job(), Job()
    journal = Journal(path).attach(job.optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        journal.attach(other.optimizer)
    with pytest.raises(RuntimeError, match="has a journal already"):
        Journal(tmp_path / "second").attach(job.optimizer)
    assert not (tmp_path / "second").exists()
    journal.close()
    journal.close()
    with pytest.raises(RuntimeError, match="not attached"):
        journal.flush()
    with Journal(tmp_path / "second").attach(job.optimizer):
        job.step(0)
    assert read(path).stop == 0
    assert read(tmp_path / "second").stop == 1


def test_an_existing_file_is_not_overwritten(path):
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="resume=True"):
        Journal(path)
    with pytest.raises(JournalError, match="is no journal"):
        Journal(path, resume=True).attach(Job().optimizer)
    assert path.read_bytes() == b"precious"


def test_bad_arguments(path):
    p = nn.Parameter(torch.ones(3))
    for error, message, optimizer in [
        (TypeError, "must be a HybridZOFO, got SGD", torch.optim.SGD([p])),
        (ValueError, "first-order groups only", HybridZOFO([p])),
        (ValueError, "capturable", HybridZOFO([p.detach()], mode="zo", lr=1e-3, capturable=True)),
    ]:
        with pytest.raises(error, match=message):
            Journal(path).attach(optimizer)
    twice = [
        dict(params=[torch.ones(2)], param_names=["w"], mode="zo", lr=1e-3),
        dict(params=[torch.ones(2)], param_names=["w"], mode="zo", lr=1e-3),
    ]
    with pytest.raises(ValueError, match=r"got twice: \['w'\]"):
        Journal(path).attach(HybridZOFO(twice))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="fsync_every"):
            Journal(path, fsync_every=bad)
    with pytest.raises(TypeError):
        Journal(path, metadata={"x": object()})
    assert not path.exists()


def test_not_inside_a_closure(path):
    job = Job()
    journal = Journal(path)

    def attaching():
        journal.attach(job.optimizer)

    def closing():
        journal.close()

    with pytest.raises(RuntimeError, match="inside a closure"):
        job.optimizer.step(attaching)
    journal.attach(job.optimizer)
    with pytest.raises(RuntimeError, match="inside a closure"):
        job.optimizer.step(closing)
    journal.close()


def test_groups_cannot_be_added_meanwhile(path):
    job = Job()
    late = torch.ones(3)
    with Journal(path).attach(job.optimizer):
        with pytest.raises(RuntimeError, match="while a journal is attached"):
            job.optimizer.add_param_group(dict(params=[late], param_names=["late"], mode="zo"))
        job.optimizer.add_param_group(dict(params=[nn.Parameter(late)], param_names=["late"]))
        job.step(0)
    assert_replays(job, path)


def test_a_full_disk(path, monkeypatch):
    """The step raises when it is done; nothing is lost when there is room again."""
    job, twin = Job(), Job()
    journal = Journal(path).attach(job.optimizer)
    file = journal._file

    class Full:
        def write(self, data):
            if len(data) > 3:
                return file.write(bytes(data[:3]))
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(file, name)

    journal._file = Full()
    with pytest.raises(OSError, match="No space"):
        job.step(0)
    twin.step(0)
    for name, p in twin.weights().items():
        assert same_bits(job.weights()[name], p)
    journal._file = file
    job.step(1)
    journal.close()
    assert assert_replays(job, path) == (0, 2, True)


def test_a_copy_of_the_optimizer_has_no_journal(path):
    import copy

    job = Job()
    with Journal(path).attach(job.optimizer):
        job.step(0)
        model, optimizer = copy.deepcopy((job.model, job.optimizer))
        optimizer.step(lambda: model[0](torch.ones(12)).sum() + model[3](torch.ones(6)).sum())
    assert read(path).stop == 1


def test_unnamed_parameters(path):
    def tensors():
        return [torch.linspace(0, 1, n) for n in (5, 7)]

    ours, model = tensors(), nn.Linear(7, 2).requires_grad_(False)
    optimizer = HybridZOFO([dict(params=[*ours, model.weight], mode="zo", lr=1e-3)])
    with pytest.raises(ValueError, match=r"model must hold all.*parameter 0 \(5,\)"):
        Journal(path).attach(optimizer, model)
    start = {"0": ours[0].clone(), "1": ours[1].clone(), "2": model.weight.clone()}
    with Journal(path).attach(optimizer):
        optimizer.step(lambda: model(ours[1]).sum() + ours[0].sum())
    assert replay(start, path).verified
    assert same_bits(start["1"], ours[1])


def test_names_from_a_model(path):
    model = nn.Linear(7, 2).requires_grad_(False)
    base = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = HybridZOFO([dict(params=list(model.parameters()), mode="zo", lr=1e-3)])
    with Journal(path).attach(optimizer, model):
        optimizer.step(lambda: model(torch.ones(7)).sum())
    assert read(path).names() == ["weight", "bias"]
    assert replay(base, path).verified


def test_a_module_is_replayed_in_place(trained, path):
    model = Job().model
    assert replay(model, path).verified
    for name, p in trained.weights().items():
        assert same_bits(dict(model.named_parameters())[name], p)


def test_no_warnings(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = Job(adapter=False)
        with Journal(path).attach(job.optimizer):
            job.step(0)
        assert_replays(job, path)


def test_other_in_place_changes_are_noticed(path):
    """A stamp tells that the weights were changed by something else."""
    job = Job()
    with Journal(path).attach(job.optimizer):
        job.step(0)
        perturb_([job.model[0].weight], job.optimizer.zo_groups()[0].direction(0), 0.1)
    with pytest.warns(UserWarning, match="not bit-identical"):
        assert replay(job.base, path).verified is False
