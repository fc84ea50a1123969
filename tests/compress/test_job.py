"""A job: the user's own network, data, training and measures through both methods; what they do wrong is one error."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress.data.job import NamedJob, named_job
from compress.errors import CompressError
from compress.exporters.ort import session
from compress.models.zoo import build, job_of
from compress.networks.jobs import batches, check_job, figures, prepare_job, train_by_job
from compress.networks.reload import reload
from compress.pipeline import METHODS
from compress.recipes.pagcp.card import removed
from compress.schema.recipe import load_recipe
from tests.command import compress as typed
from tests.command import one_error
from tests.networks import shapes

# Two inputs, one of them whole numbers; two heads nested in what it returns; weights from a file beside it.
CODE = """\
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import compress

# shapes

@dataclass
class Sizes:
    train: int = 160
    held: int = 60
    test: int = 80


HERE = Path(__file__).parent
CALLS = []
IMAGES, LABELS, MASKS = shapes(300, 12)
IMAGES = IMAGES.float() / 255
KINDS = torch.arange(300) % 2
TRAIN, HELD, TEST = torch.arange(300).split((Sizes().train, Sizes.held, Sizes.test))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.kind = nn.Embedding(2, 16)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.classes, self.matte = nn.Linear(16, 3), nn.Conv2d(16, 1, 1)

    def forward(self, image, kind):
        y = torch.relu(self.norm(self.one(image)) + self.kind(kind)[:, :, None, None])
        z = torch.relu(self.two(y))
        return self.classes(z.mean((2, 3))), {"matte": [self.matte(z)]}


print("reading")


def network():
    print("loading")
    net = Net()
    net.load_state_dict(load_file(HERE / "dense.safetensors"))
    return net


def given(at):
    return {"image": IMAGES[at], "kind": KINDS[at]}


def measured(net, at):
    with torch.no_grad():
        classes, more = net(**given(at))
    mask = MASKS[at].float() / 255
    return {
        "accuracy": (classes.argmax(1) == LABELS[at]).float().mean(),
        "matte error": float((more["matte"][0][:, 0] - mask).abs().mean()),
    }


def calibrate(net):
    CALLS.append("calibrate")
    return measured(net, HELD)


def evaluate(net):
    CALLS.append("evaluate")
    print("evaluating")
    return measured(net, TEST)


def loss(net, at):
    classes, more = net(**given(at))
    mask = MASKS[at].float() / 255
    return {
        "accuracy": functional.cross_entropy(classes, LABELS[at]),
        "matte error": (more["matte"][0][:, 0] - mask).abs().mean(),
    }


def batches():
    return TRAIN[:64].split(32)


def train(net, epochs, seed):
    CALLS.extend(["train"] * epochs)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(epochs):
        for at in TRAIN[torch.randperm(len(TRAIN))].split(32):
            optimizer.zero_grad()
            sum(loss(net, at).values()).backward()
            optimizer.step()


job = compress.Job(
    network=network,
    example=given(HELD[:8]),
    calibrate=calibrate,
    evaluate=evaluate,
    better={"accuracy": "higher", "matte error": "lower"},
    train=train,
    loss=loss,
    batches=batches,
)
"""
# A clean process has no tests to import: the samples are drawn in the file itself.
CODE = CODE.replace("# shapes\n", f"import numpy as np\n\n\n{inspect.getsource(shapes)}\n")

PAGCP = """\
extends: pagcp
description: small
finetune: {epochs: 2, warmup_epochs: 0}
export: {samples: 4}
bench: null
pagcp: {flops: 0.4, rounds: 1, between: 0, round_to: 4}
"""

MP = """\
extends: global-mp-network
description: small
sparsity: 0.7
finetune: {epochs: 2, warmup_epochs: 0}
export: null
bench: null
"""

# In memory: one input, one output, no loss, a training without epochs.
PLAIN = """\
import torch
from torch import nn

WEIGHTS = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def distance(net):
    return {"distance": (net(WEIGHTS) - WEIGHTS[:, :4]).square().mean().item()}


def fit(net):
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (net(WEIGHTS) - WEIGHTS[:, :4]).square().mean().backward()
        optimizer.step()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of jobs and recipes; tests must not change them."""
    folder = tmp_path_factory.mktemp("jobs")
    for name, text in (("mine.py", CODE), ("plain_net.py", PLAIN), ("pagcp.yaml", PAGCP), ("mp.yaml", MP)):
        (folder / name).write_text(text)
    scope: Any = held(folder).job.train.__globals__  # type: ignore[union-attr]
    torch.manual_seed(0)
    net = scope["Net"]()
    scope["train"](net, 6, 0)
    save_file(net.state_dict(), folder / "dense.safetensors")
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any]]:
    """A whole run of PAGCP; tests must not change it."""
    job_of(f"{place}/mine.py:job").job.calibrate.__globals__["CALLS"].clear()  # type: ignore[union-attr]
    ran = typed("prune", f"{place}/mine.py:job", "-r", place / "pagcp.yaml", "--out", place / "run")
    assert ran.code == 0, ran.err
    assert "accuracy: 0." in ran.out and "matte error: 0." in ran.out and "fewer)" in ran.out
    return place / "run", json.loads((place / "run" / "release" / "report.json").read_text())


def held(place: Path, **changes: Any) -> NamedJob:
    """The job, with other functions in it."""
    found = job_of(f"{place}/mine.py:job")
    assert found is not None
    return named_job(dataclasses.replace(found.job, **changes), found.name) if changes else found


def net_of(place: Path) -> Any:
    return held(place).job.network().eval()


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_what_is_reported_is_what_the_functions_say_of_the_saved_networks(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    run, report = finished
    own = held(place)
    for label, folder in (("dense", run / "dense"), ("pruned", run / "model")):
        said = own.job.evaluate(reload(folder, own.name).model)
        for row in report["quality"]["tasks"]:
            assert row[label] == pytest.approx(float(said[row["task"]]), rel=1e-6)
    ways = {row["task"]: row["higher_is_better"] for row in report["quality"]["tasks"]}
    assert ways == {"accuracy": True, "matte error": False}
    assert 0.4 <= report["size"]["flops_removed"] < 0.75
    dense = load_file(place / "dense.safetensors")
    kept = load_file(run / "dense" / "model.safetensors")
    assert all(torch.equal(dense[name], kept[name]) for name in dense)  # the network as it was given


def test_the_oracle_asked_calibrate_on_held_out_data_and_readings_are_of_its_figures(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    _, report = finished
    own, (one,) = held(place), report["rounds"]
    base = {task: float(value) for task, value in own.job.calibrate(net_of(place)).items()}
    assert {t: v[t] for t, v in one["base"].items()} == pytest.approx(base)
    for task, values in one["values"].items():
        # T = 6: six times the error, or a sixth of the accuracy, is all of a tolerance.
        ratio = values[task] / base[task]
        worse = -np.log(ratio) if task == "accuracy" else np.log(ratio)
        assert one["readings"][task] == pytest.approx(worse / np.log(6), abs=1e-6)


def test_the_onnx_file_takes_the_inputs_by_name_and_gives_what_torch_gives(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    run, report = finished
    saved = reload(run / "model", f"{place}/mine.py:job")
    x = {"image": torch.rand(3, 3, 12, 12), "kind": torch.tensor([1, 0, 1])}
    runtime = session(run / "release" / "onnx" / "model.onnx", 1)
    got = runtime.run(["output0", "output1"], {k: v.numpy() for k, v in x.items()})
    with torch.no_grad():
        classes, more = saved.model(**x)
    for want, found in zip((classes, more["matte"][0]), got, strict=True):
        assert np.abs(want.numpy() - found).max() < 1e-4
    assert set(report["export"]["onnx"]["pruned"]["outputs"]) == {"output0", "output1"}
    card = (run / "release" / "README.md").read_text()
    assert '"image": np.zeros((1, 3, 12, 12), np.float32), "kind": np.zeros((1,), np.int64)' in card


def test_the_saved_network_is_smaller_and_verified_in_a_clean_process(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    run, _ = finished
    name = f"{place}/mine.py:job"
    ran = typed("verify", run, "--network", name, "--measure")
    assert ran.code == 0, ran.out + ran.err
    assert "0 do not hold, 0 cannot be checked here" in ran.out and "accuracy, dense" in ran.out
    ran = typed("eval", run / "model", "--network", name, "--json")
    assert ran.code == 0, ran.err
    one_error(typed("verify", run), 2, "the network is code of a file")
    one_error(typed("eval", run, "--like", run, "--network", f"{place}/mine.py:network"), 2, "name the job")
    net = compress.load(run / "model", network=name)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in net_of(place).parameters())


def test_a_run_that_lost_its_last_stages_goes_on_to_the_same_bytes(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    for stage in ("release", "export-dense", "export-pruned", "model", "round-1/finetuned", "round-1/evaluation"):
        shutil.rmtree(tmp_path / "run" / stage)
    done = compress.prune(f"{place}/mine.py:job", place / "pagcp.yaml", tmp_path / "run", until="model")
    assert done.saved == tmp_path / "run" / "model"
    for name in ("model.safetensors", "fingerprint.safetensors", "network.json"):
        assert (done.saved / name).read_bytes() == (run / "model" / name).read_bytes()


def test_plan_times_a_call_and_counts_as_many_as_the_run_made(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    calls: list[str] = held(place).job.calibrate.__globals__["CALLS"]  # type: ignore[attr-defined]
    made = {role: calls.count(role) for role in ("calibrate", "evaluate", "train")}
    ran = typed("plan", f"{place}/mine.py:job", "-r", place / "pagcp.yaml", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)["job"]
    assert all(seconds > 0 for seconds in facts["seconds"].values())
    # Behind the first tests' own calls and the clean process'.
    low, high = facts["calls"]["calibrate"]
    assert low <= made["calibrate"] <= high + 4, (made, facts)
    assert facts["calls"]["train"] == [2, 2]
    assert facts["calls"]["evaluate"] == [3, 3]


# --- Global MP, in memory -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(place: Path) -> Any:
    """The file of a network, imported as a user's own is."""
    sys.path.insert(0, str(place))
    import importlib

    yield importlib.import_module("plain_net")
    sys.path.remove(str(place))


def plain_job(plain: Any, **changes: Any) -> compress.Job:
    given = {
        "network": plain.network,
        "example": plain.WEIGHTS[:6],
        "calibrate": plain.distance,
        "evaluate": plain.distance,
        "better": {"distance": "lower"},
        "train": plain.fit,
    }
    return compress.Job(**{**given, **changes})


def test_global_mp_holds_its_masks_through_the_users_own_steps(plain: Any, place: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def fit(net: Any) -> None:
        before = (net[0].weight == 0).clone()
        optimizer = torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.1)
        for _ in range(15):
            optimizer.zero_grad()
            (net(plain.WEIGHTS) - plain.WEIGHTS[:, :4]).square().mean().backward()
            optimizer.step()
            seen.append(float(net[0].weight.detach()[before].abs().max()))
            remembered = optimizer.state[net[0].weight]["exp_avg"][before]
            seen.append(float(remembered.abs().max()))

    planned = compress.plan(plain_job(plain), place / "mp.yaml")
    assert planned["prune"] == 358 and planned["job"]["seconds"]["train"] is None  # it takes no epochs
    done = compress.prune(plain_job(plain, train=fit), place / "mp.yaml", tmp_path / "run")
    assert len(seen) == 30 and set(seen) == {0.0}
    net, masks = done.model, load_file(done.saved / "masks.safetensors")
    gone = load_file(tmp_path / "run" / "cut" / "masks.safetensors")
    assert masks and sum(int((~m).sum()) for m in gone.values()) == done.report["size"]["pruned_weights"] == 358
    for name, mask in gone.items():
        weight = dict(net.named_parameters())[name].detach()
        assert not torch.count_nonzero(weight[~mask])
        assert torch.count_nonzero(weight[mask]) == mask.sum()
    (row,) = done.report["quality"]["tasks"]
    assert row["pruned"] == pytest.approx(plain.distance(net)["distance"], rel=1e-5)
    assert row["pruned"] < row["before_training"]


def test_steps_that_no_hook_sees_are_found_out(plain: Any, place: Path) -> None:
    def fit(net: Any) -> None:
        with torch.no_grad():
            for weight in net.parameters():
                weight += 1

    own = named_job(plain_job(plain, train=fit), f"{place}/plain_net.py:network")
    net, spec = plain.network(), load_recipe(str(place / "mp.yaml"), METHODS, ()).finetune  # type: ignore[attr-defined]
    with pytest.raises(CompressError, match=r"train moved weights that are pruned: 100 of 0\.weight") as caught:
        train_by_job(own, net, spec, masks={"0.weight": torch.arange(384).view(32, 12) >= 100})
    assert f"{__file__}, line" in caught.value.where and "torch.optim" in caught.value.fix


def test_a_job_in_memory_must_be_built_again_by_a_file(plain: Any, place: Path, tmp_path: Path) -> None:
    def prune(job: compress.Job, **more: Any) -> None:
        compress.prune(job, place / "mp.yaml", tmp_path / "never", **more)

    with pytest.raises(CompressError, match=r"cannot be built again in a clean process: .*<lambda>"):
        prune(plain_job(plain, network=lambda: plain.network()))
    with pytest.raises(CompressError, match="its class Sequential is one of torch"):
        prune(plain_job(plain, network=plain.network()))
    with pytest.raises(CompressError, match=r"another network than the job's: 0\.weight is .9, 12. in memory"):
        other = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
        prune(plain_job(plain, network=other), network=f"{place}/plain_net.py:network")
    assert not (tmp_path / "never").exists()


# --- what is wrong --------------------------------------------------------------------------------------------------


def asked(net: Any) -> dict[str, float]:
    return {"accuracy": 0.5, "matte error": 0.1}


def changing(change: Callable[[Any], Any]) -> Callable[[Any], dict[str, float]]:
    def calibrate(net: Any) -> dict[str, float]:
        change(net)
        return asked(net)

    return calibrate


def raising(net: Any) -> dict[str, float]:
    return {"accuracy": net.nothing, "matte error": 0.0}


def more_each_time() -> Callable[[Any], dict[str, float]]:
    count = iter(range(100))
    return lambda net: {"accuracy": 0.5 + 0.001 * next(count), "matte error": 0.1}


@pytest.mark.parametrize(
    ("calibrate", "said"),
    [
        (lambda net: asked(net) | {"accuracy": float("nan")}, "calibrate gives nan for 'accuracy'"),
        (lambda net: {"accuracy": 1.0}, "calibrate gives no 'matte error'"),
        (lambda net: asked(net) | {"map": 1.0}, "calibrate gives 'map', which better does not name"),
        (lambda net: asked(net) | {"accuracy": "good"}, "calibrate gives a str for 'accuracy'"),
        (lambda net: 0.5, "calibrate returned float, not a dict"),
        (changing(lambda net: net.two.weight.add_(1)), "calibrate changes the network: two.weight is other"),
        (changing(lambda net: net.norm.running_mean.zero_()), "changes the network: norm.running_mean is other"),
        (changing(lambda net: setattr(net, "two", copy.deepcopy(net.two))), "the module two is another"),
        (changing(lambda net: net.add_module("more", nn.ReLU())), "the module more is new"),
        (more_each_time(), "calibrate gives accuracy 0.5, and 0.501 of the same network the second time"),
        (raising, "the job's calibrate raised AttributeError: 'Net' object has no attribute 'nothing'"),
    ],
)
def test_a_calibrate_that_cannot_be_relied_on_is_one_error(
    calibrate: Callable[[Any], Any], said: str, place: Path
) -> None:
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    setup = prepare_job(held(place, calibrate=calibrate), recipe)
    with pytest.raises(CompressError, match=said.replace("(", r"\(")) as caught:
        check_job(setup)
    assert __file__ in caught.value.where and "line" in caught.value.where and caught.value.fix


def test_an_evaluate_is_watched_alike(place: Path) -> None:
    own = held(place, evaluate=changing(lambda net: net.one.weight.zero_()))
    with pytest.raises(CompressError, match=r"evaluate changes the network: one\.weight"):
        figures(own, "evaluate", net_of(place).eval(), 0)


def replaced(net: Any) -> None:
    net.two = nn.Conv2d(16, 16, 3, padding=1)


def narrowed(net: Any) -> None:
    net.two.weight = nn.Parameter(net.two.weight[:8].detach().clone())


def hooked(net: Any) -> None:
    net.two.weight.data.add_(0.01)
    net.two.register_forward_hook(lambda module, inputs, out: out + 1)


def broken(net: Any) -> None:
    net.two.weight.data[0] = float("nan")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (replaced, "train changes what the network is made of: the module two is another"),
        (narrowed, "train changes what the network is made of: the shape of two.weight is another"),
        (broken, "train leaves NaN or infinity in two.weight"),
        (lambda net: net.half(), "made of: the type of one.weight is another"),
        (hooked, "train leaves the hooks of two is another: the network that is saved has none"),
        (lambda net: None, "train left every weight as it was"),
        (lambda net: 1 / 0, "the job's train raised ZeroDivisionError: division by zero"),
        (lambda net: sys.exit(3), r"the job's train ends the program: exit\(3\)"),
    ],
)
def test_a_training_that_cannot_be_gone_on_from_is_one_error(
    train: Callable[[Any], Any], said: str, place: Path
) -> None:
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    with pytest.raises(CompressError, match=said) as caught:
        train_by_job(held(place, train=train), net_of(place), recipe.finetune)
    assert __file__ in caught.value.where and caught.value.fix


def test_a_weight_that_is_made_of_others_is_no_fault_of_the_users_loop(plain: Any, place: Path) -> None:
    def train(net: Any) -> None:
        nn.utils.parametrizations.weight_norm(net[2])
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(torch.ones(2, 12)).sum().backward()
        optimizer.step()

    net = plain.network()
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    own = NamedJob(plain_job(plain, train=train), f"{place}/plain_net.py:network", "")
    with pytest.raises(CompressError, match=r"made of: the weight 2\.weight is gone"):
        train_by_job(own, net, recipe.finetune, masks={"2.weight": net[2].weight.detach() > 0})


COUNTED = """
import compress, torch
from pathlib import Path
from torch import nn
from counted_helper import shift

torch.manual_seed(0)
SEEN = torch.randn(32, 4)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def score(net):
    with torch.no_grad():
        error = float((net(SEEN) - SEEN[:, :2]).abs().mean())
    return {"error": error + shift() + float(Path(__file__).with_name("read.txt").read_text())}


job = compress.Job(network=network, example=SEEN[:4], calibrate=score, evaluate=score, better={"error": "lower"})
"""


def test_what_changes_between_two_processes_is_the_jobs_and_told_so(place: Path, tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    (tmp_path / "counted_helper.py").write_text("def shift():\n    return 0.0\n")
    (tmp_path / "read.txt").write_text("0")
    words = ("prune", f"{tmp_path}/counted.py:job", "-r", place / "pagcp.yaml", "--out", tmp_path / "run")
    ran = typed(*words, "--until", "plan")
    assert ran.code == 0, ran.err
    # A file that it reads is not known to be its own; what it says of the same network is.
    (tmp_path / "read.txt").write_text("0.5")
    one_error(typed(*words), 1, "of the saved network, and gave", "seed what splits or draws them", "counted.py, line")
    # What it imports from its own folder is.
    known = job_of(f"{tmp_path}/counted.py:job")
    assert known is not None and named_job(known.job, known.name).sha256 == known.sha256
    (tmp_path / "counted_helper.py").write_text("def shift():\n    return 0.5\n")
    assert named_job(known.job, known.name).sha256 != known.sha256


@pytest.mark.parametrize(("value", "said"), [(0.0, "calibrate gives 0 for 'distance'"), (-2.0, "calibrate gives -2")])
def test_a_share_of_nothing_is_refused_before_anything_is_made(
    value: float, said: str, plain: Any, place: Path, tmp_path: Path
) -> None:
    job = plain_job(plain, calibrate=lambda net: {"distance": value})
    for verb in ("plan", "prune"):
        more = {"out": tmp_path / "run"} if verb == "prune" else {}
        with pytest.raises(CompressError, match=said) as caught:
            getattr(compress, verb)(job, place / "pagcp.yaml", **more)
        assert caught.value.where == "pagcp.tolerances.distance" and "absolute" in caught.value.fix


def test_a_network_of_doubles_is_refused_before_anything_is_made(plain: Any, place: Path) -> None:
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    with pytest.raises(CompressError, match=r"the weight 0\.weight is float64") as caught:
        prepare_job(NamedJob(plain_job(plain, network=lambda: plain.network().double()), "x.py:y", ""), recipe)
    assert "train.precision" not in caught.value.fix


def random(net: Any) -> Any:
    net.two.register_forward_hook(lambda module, inputs, out: out + torch.rand(1))
    return net


@pytest.mark.parametrize(
    ("changes", "said", "where"),
    [
        (lambda p: {"example": held(p).job.example["image"][:1]}, "of a batch of one nothing tells", "example"),
        (lambda p: {"example": {"image": [1.0]}}, "the example holds list: the network is called with", "example"),
        (lambda p: {"example": (torch.rand(4, 2), torch.rand(3, 2))}, "differ in their batch", "example"),
        (
            lambda p: {"example": torch.rand(4, 3, 12, 12)},
            "the network does not take the example: TypeError",
            "example",
        ),
        (lambda p: {"network": lambda: random(net_of(p))}, "gives other outputs .* the second time", "network"),
        (lambda p: {"network": lambda: 5}, "the job's network is int, not a torch module", "test_job.py"),
        (lambda p: {"network": lambda: 1 / 0}, "the job's network raised ZeroDivisionError", "test_job.py"),
        (lambda p: {"batches": list}, "batches gives none", "batches"),
        (lambda p: {"loss": lambda net, at: 0.5}, "loss gives 0.5, not one finite number as a tensor", "loss"),
        (lambda p: {"loss": lambda net, at: torch.ones(())}, "depends on no weight", "loss"),
    ],
)
def test_a_job_that_does_not_fit_together_is_one_error(
    changes: Callable[[Path], Any], said: str, where: str, place: Path
) -> None:
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    with pytest.raises(CompressError, match=said) as caught:
        check_job(prepare_job(held(place, **changes(place)), recipe))
    assert where in caught.value.where and caught.value.fix


def test_the_command_line_says_it_in_three_lines_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    text = CODE.replace('CALLS.append("calibrate")', "net.two.weight.data.zero_()")
    (tmp_path / "wrong.py").write_text(text)
    shutil.copyfile(place / "dense.safetensors", tmp_path / "dense.safetensors")
    line = next(i for i, told in enumerate(text.splitlines(), 1) if told.startswith("def calibrate"))
    ran = typed("prune", f"{tmp_path}/wrong.py:job", "-r", place / "pagcp.yaml", "--out", tmp_path / "run")
    one_error(ran, 1, "calibrate changes the network", f"wrong.py, line {line}, calibrate", "copy.deepcopy(model)")
    assert not (tmp_path / "run").exists()
    (tmp_path / "wrong.py").write_text(CODE + "\nraise ValueError('no data')\n")
    ran = typed("prune", f"{tmp_path}/wrong.py:job", "-r", place / "pagcp.yaml", "--out", tmp_path / "run")
    one_error(ran, 2, "the file cannot be run: ValueError: no data", f"wrong.py, line {len(CODE.splitlines()) + 2}")


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("pagcp", ["data.package=mnist"], "a job has its own data"),
        ("pagcp", ["arguments={width: 3}"], "takes no arguments"),
        ("pagcp", ["pagcp.trials={epochs: [1]}"], "trials train on our data"),
        ("mp", ["global-mp.schedule=gradual", "train.epochs=5"], "gradual schedule"),
        ("pagcp", ["pagcp.tolerances={accuracy: {relative: 2}, matte error: {relative: 2}}"], "is all of it"),
        ("pagcp", ["pagcp.tolerances={other: {relative: 0.2}}"], "there is no task 'other'"),
    ],
)
def test_what_a_recipe_cannot_ask_of_a_job(recipe: str, changes: list[str], said: str, place: Path) -> None:
    words = [word for change in changes for word in ("--set", change)]
    ran = typed("prune", f"{place}/mine.py:job", "-r", place / f"{recipe}.yaml", "--out", place / "never", *words)
    one_error(ran, 2, said)


def test_without_a_loss_the_weights_norms_say_what_goes_and_taylor_is_refused(plain: Any, place: Path) -> None:
    own = named_job(plain_job(plain), f"{place}/plain_net.py:network")
    recipe: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ())
    assert prepare_job(own, recipe).recipe.options.saliency == "l1"
    asked: Any = load_recipe(str(place / "pagcp.yaml"), METHODS, ["pagcp.saliency=taylor"])
    with pytest.raises(CompressError, match="taylor needs gradients of a loss"):
        prepare_job(own, asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibrate": 3}, "calibrate is int, not a function"),
        ({"better": {}}, "better names no task"),
        ({"better": {"a": "more"}}, "better says 'more' of 'a'"),
        ({"loss": asked}, "loss and batches go together"),
    ],
)
def test_a_job_is_checked_when_it_is_made(changes: dict[str, Any], said: str, plain: Any) -> None:
    with pytest.raises(compress.UsageError, match=said):
        plain_job(plain, **changes)


def test_batches_are_drawn_alike_in_every_process(place: Path) -> None:
    own = held(place, batches=lambda: torch.randperm(100).split(50))
    again = held(place, batches=lambda: torch.randperm(100).split(50))
    assert all(torch.equal(a, b) for a, b in zip(batches(own, 5), batches(again, 5), strict=True))


def test_what_is_not_cut_counts_in_the_share_that_is_said_to_be_gone() -> None:
    size: dict[str, Any] = {"flops": {"dense": 100, "pruned": 60}, "flops_removed": 0.4}
    assert removed({"size": size}) == 0.4
    size["flops_elsewhere"] = {"dense": 300, "pruned": 300}
    assert removed({"size": size}) == pytest.approx(0.1)


def test_a_function_that_says_it_gives_a_job_is_one(tmp_path: Path, plain: Any, place: Path) -> None:
    head = f"import sys\nsys.path.insert(0, {str(place)!r})\nimport compress\nimport plain_net as p\n"
    made = (
        "compress.Job(network=p.network, example=p.WEIGHTS[:6], calibrate=p.distance, evaluate=p.distance,"
        " better={'distance': 'lower'})"
    )
    file = tmp_path / "made.py"
    file.write_text(
        f"{head}def make() -> compress.Job:\n    return {made}\n"
        f"def silent():\n    return {made}\ndef other() -> 'compress.Job':\n    return 3\n"
    )
    found = job_of(f"{file}:make")
    assert found is not None and list(found.job.better) == ["distance"]
    assert isinstance(build(f"{file}:make", {}), nn.Module)
    for name, said in (("silent", "returned a job, and does not say so"), ("other", "returned int")):
        with pytest.raises(compress.UsageError, match=said):
            build(f"{file}:{name}", {})


def test_outputs_of_whole_numbers_are_told_to_be_left_out(plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain.network()

        def forward(self, x: Any) -> Any:
            return self.net(x), x.long()

    job = plain_job(
        plain, network=Told, calibrate=lambda net: {"distance": 1.0}, evaluate=lambda net: {"distance": 1.0}
    )
    recipe = load_recipe("pagcp", METHODS, ["pagcp.saliency=l1"])
    check_job(prepare_job(named_job(job, "plain_net.py:network"), recipe))
    assert "an output of whole numbers: neither compared nor exported" in capsys.readouterr().err
