"""Plans of real recipes on tiny bases: every task can be traced, operators are counted right, and `auto` becomes numbers."""

from pathlib import Path
from typing import Any

import pytest

from hone.base_model import find_base_model
from hone.errors import ResourceError
from hone.methods import METHODS, why_not
from hone.recipe import Recipe, parse_recipe
from hone.run_folder import PLAN_FILE, read_events
from hone.storage import Home
from hone.tasks import TASKS
from tests.samples import write_sample
from tests.tiny import BASE_OF, MAKERS
from training.data import prepare_data
from training.job import Job
from training.launch import prepare_job
from training.plan.choose import USABLE, Asked
from training.plan.hardware import Cluster, load_hardware, load_prices, parse_cluster
from training.plan.plan import Plan, ask, dtype_on, make_plan, settle
from training.resources import without_cluster

HARDWARE, PRICES = load_hardware(), load_prices()
DATA: dict[str, Any] = {"validation_fraction": 0.25, "max_length": 64, "stop_on": []}
PAIRS = [(task, method) for task in TASKS for method in METHODS if not why_not(task, method)]


class Place:
    """Bases and rows, made once."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, Home(root / "home")
        self.home.ready()
        self._bases: dict[str, Path] = {}
        self._rows: dict[str, Path] = {}

    def recipe(self, task: str = "chat", kind: str = "lora", **sections: dict[str, Any]) -> Recipe:
        maker = BASE_OF[task]
        if maker not in self._bases:
            (self.root / maker).mkdir()
            self._bases[maker] = MAKERS[maker](self.root / maker)
        data = {**DATA, "train": str(self.rows(task))}
        tree = {"name": "plan", "task": task, "base": str(self._bases[maker]), "data": data}
        return parse_recipe({**tree, "method": {"type": kind}, **sections}, where="test")

    def rows(self, task: str) -> Path:
        if task not in self._rows:
            self._rows[task] = write_sample(self.root, task)
        return self._rows[task]

    def ask(self, recipe: Recipe, *, on: str = "1xCPU:8GiB") -> Asked:
        cluster = parse_cluster(on, HARDWARE)
        base = find_base_model(recipe.base, home=self.home)
        data = prepare_data(recipe, base, home=self.home)
        return ask(recipe, base, data, on_gpu=cluster.on_gpu, dtype=dtype_on(recipe, cluster))

    def plan(self, recipe: Recipe, *, on: str) -> Plan:
        base = find_base_model(recipe.base, home=self.home)
        data = prepare_data(recipe, base, home=self.home)
        return make_plan(recipe, base, data, cluster=parse_cluster(on, HARDWARE), hardware=HARDWARE, prices=PRICES)

    def settled(self, recipe: Recipe, cluster: Cluster) -> Recipe:
        base = find_base_model(recipe.base, home=self.home)
        data = prepare_data(recipe, base, home=self.home)
        return settle(recipe, make_plan(recipe, base, data, cluster=cluster, hardware=HARDWARE, prices=PRICES))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_every_task_and_method_can_be_traced(place: Place, task: str, method: str) -> None:
    asked = place.ask(place.recipe(task, method))
    assert asked.counts.total > asked.counts.trained > 0 or method == "full"
    assert asked.work.flops_a_unit > 0
    assert asked.activations.of(8).live > asked.activations.of(1).live > 0


def flops(place: Place, method: str, **train: Any) -> tuple[float, Asked]:
    asked = place.ask(place.recipe("chat", method, train=train))
    return asked.work.flops_a_unit, asked


def test_operators_are_those_of_the_gradients_that_are_taken(place: Place) -> None:
    full, asked = flops(place, "full")
    embedding = 32 * 403  # looked up, not multiplied with; the head is as large, and makes logits for a part of the tokens
    body = asked.counts.total - 2 * embedding
    assert 6 * body < full < 6.6 * (body + embedding)
    lora = place.ask(place.recipe(method={"type": "lora", "r": 1})).work.flops_a_unit
    assert 4 * body < lora < 5 * (body + embedding)
    again, _ = flops(place, "full", gradient_checkpointing=True)
    assert 1.1 * full < again < 1.4 * full


def test_checkpointing_and_sixteen_bits_take_less_memory(place: Place) -> None:
    plain = place.ask(place.recipe("chat", "full"))
    again = place.ask(place.recipe("chat", "full", train={"gradient_checkpointing": True}))
    assert again.activations.of(8).live < plain.activations.of(8).live
    half = place.ask(place.recipe("chat", "full"), on="1xH100")
    assert half.counts.bytes_each == 2
    assert half.activations.of(8).live < plain.activations.of(8).live


def test_a_plan_recommends_what_fits_and_says_what_it_costs(place: Place) -> None:
    plan = place.plan(place.recipe("chat", "lora", scaling={"num_workers": 2}, zero={"stage": "auto"}), on="8xH100")
    assert [each.stage for each in plan.stages] == [0, 1, 2, 3]
    assert plan.recommended is not None
    assert plan.recommended.fits
    assert plan.recommended.cost == pytest.approx(plan.recommended.accelerator_hours * PRICES.per_hour["H100"])
    assert [each.workers for each in plan.others] == [1, 2, 4, 8]
    assert plan.advice == ""


def test_where_nothing_fits_the_plan_says_what_to_do(place: Place) -> None:
    plan = place.plan(place.recipe("chat", "full"), on="1xCPU:0.5GiB")
    assert plan.recommended is None
    for way in ("more workers", "gradient_checkpointing", "max_length", "method lora"):
        assert way in plan.advice
    assert "\n" not in plan.advice


def test_where_the_recipes_own_choice_does_not_fit_the_plan_names_one_that_does(place: Place) -> None:
    recipe = place.recipe("chat", "full", data={**DATA, "train": str(place.rows("chat"))}, train={"micro_batch_size": 32})
    needed = min(each.bytes["total"] for each in place.plan(recipe, on="1xCPU:8GiB").stages)
    plan = place.plan(recipe, on=f"1xCPU:{(needed - 2**20) / USABLE / 2**30:.6f}GiB")
    assert not any(each.fits for each in plan.stages)
    assert plan.recommended is not None
    assert plan.recommended.micro_batch_size < 32
    assert f"train.micro_batch_size {plan.recommended.micro_batch_size}" in plan.advice


def test_more_workers_than_there_are_is_a_mistake(place: Place) -> None:
    with pytest.raises(ResourceError, match="has room for 2"):
        place.plan(place.recipe("chat", scaling={"num_workers": 4}), on="2xCPU:8GiB")


def test_auto_becomes_the_largest_portion_that_fits(place: Place) -> None:
    recipe = place.recipe("chat", zero={"stage": "auto"}, train={"micro_batch_size": "auto"}, scaling={"num_workers": [2, 4]})
    settled = place.settled(recipe, parse_cluster("4xCPU:8GiB", HARDWARE))
    assert settled.train.micro_batch_size == 16  # all of a worker's share of 32 rows
    assert settled.zero.stage in (0, 1, 2, 3)
    with pytest.raises(ResourceError, match="does not fit"):
        place.settled(recipe, parse_cluster("4xCPU:0.4GiB", HARDWARE))


def test_an_elastic_recipe_is_planned_at_both_ends_and_has_to_fit_at_both(place: Place) -> None:
    recipe = place.recipe("chat", zero={"stage": "auto"}, train={"micro_batch_size": "auto"}, scaling={"num_workers": [1, 4]})
    plan = place.plan(recipe, on="4xCPU:8GiB")
    assert plan.workers == [1, 4]
    assert [(each.workers, each.stage) for each in plan.stages] == [(n, stage) for n in (1, 4) for stage in (0, 1, 2, 3)]
    assert plan.as_it_is is not None
    # One machine whose memory its workers share: it has room for one of them alone, and for none of four.
    crowded = parse_cluster("4xCPU:1.5GiB", HARDWARE).model_copy(update={"shares_memory": True})
    with pytest.raises(ResourceError, match="on 4 workers"):
        place.settled(recipe, crowded)
    assert place.settled(place.recipe("chat", zero={"stage": "auto"}), crowded).zero.stage in (0, 1, 2, 3)
    assert place.plan(recipe, on="2xCPU:8GiB").workers == [1, 2]  # as many as there is room for


def test_workers_that_share_rows_hold_a_slice_of_each_and_send_it_round_attention(place: Place) -> None:
    alone = place.ask(place.recipe("chat", "full"))
    shared = place.ask(place.recipe("chat", "full", scaling={"num_workers": 2, "sequence_parallel_size": 2}))
    assert 0.4 * alone.activations.of(8).live < shared.activations.of(8).live < 0.65 * alone.activations.of(8).live
    assert shared.work.flops_a_unit == pytest.approx(alone.work.flops_a_unit, rel=0.1)
    assert (shared.largest(2), shared.largest(4), alone.largest(4)) == (32, 16, 8)
    layers, heads, key_values, width = 2, 4, 2, 8
    there_and_back = (
        2 * layers * (2 * heads + 2 * key_values) * width * 4
    )  # bytes for each token; a half is a worker's, and half of it stays
    assert shared.work.exchanged_a_unit == pytest.approx(there_and_back / 4, rel=0.02)
    assert alone.work.exchanged_a_unit == 0


def test_workers_that_share_rows_are_planned_in_groups(place: Place) -> None:
    shared = {"num_workers": [2, 6], "sequence_parallel_size": 2}
    recipe = place.recipe("chat", train={"micro_batch_size": "auto"}, scaling=shared)
    plan = place.plan(recipe, on="5xCPU:8GiB")
    assert plan.workers == [2, 4]  # a fifth would be left over
    assert [each.workers for each in plan.others] == [2, 4]
    assert plan.as_it_is is not None
    assert plan.as_it_is.micro_batch_size == 32  # all rows of a step, as two workers have them together
    assert [each.workers for each in place.plan(recipe, on="8xH100").others] == [2, 4, 6, 8]


def test_offloading_leaves_only_the_stages_that_can(place: Place) -> None:
    offloaded = {"stage": "auto", "offload_optimizer": True}
    plan = place.plan(place.recipe("chat", "full", zero=offloaded), on="2xH100")
    assert [each.stage for each in plan.stages if each.is_allowed] == [1, 2, 3]
    assert all(each.bytes["optimizer"] == 0 < each.bytes["host"] for each in plan.stages[1:])
    both = place.plan(place.recipe("chat", "full", zero={**offloaded, "offload_param": True}), on="2xH100")
    assert both.as_it_is is not None
    assert both.as_it_is.stage == 3


def test_on_a_gpu_that_is_too_small_the_plan_names_offloading_where_that_helps(place: Place) -> None:
    one = {"micro_batch_size": 1}
    moved = {"stage": 3, "offload_optimizer": True, "offload_param": True}
    there = place.plan(place.recipe("chat", "full", train=one, zero=moved), on="1xH100").stages[3].bytes["total"]
    recipe = place.recipe("chat", "full", train=one, zero={"stage": "auto"})
    assert there < min(each.bytes["total"] for each in place.plan(recipe, on="1xH100").stages)
    plan = place.plan(recipe, on=f"1xH100:{(there + 100) / USABLE / 2**30:.9f}GiB")
    assert plan.recommended is None
    assert "zero.offload_optimizer true" in plan.advice


def test_auto_takes_no_stage_that_the_recipe_cannot_run_under(place: Place) -> None:
    recipe = place.recipe("chat", zero={"stage": "auto"}, method={"type": "lora", "use_dora": True})
    settled = place.settled(recipe, parse_cluster("2xCPU:8GiB", HARDWARE))
    assert settled.zero.stage in (0, 1, 2)


def test_a_prepared_job_holds_numbers(place: Place) -> None:
    recipe = place.recipe("chat", zero={"stage": "auto"}, train={"micro_batch_size": "auto"})
    job = prepare_job(recipe, home=place.home, run_id="auto", plan=without_cluster)
    read = Job.load(job.folder).recipe
    assert not read.is_open
    plan = Plan.model_validate_json((job.folder / PLAN_FILE).read_bytes())
    assert plan.as_it_is is not None
    assert (plan.as_it_is.stage, plan.as_it_is.micro_batch_size) == (read.zero.stage, read.train.micro_batch_size)


def test_a_run_that_cannot_be_planned_is_prepared_all_the_same_unless_it_leaves_something_open(place: Place) -> None:
    many = {"num_workers": 32}  # more than this machine has cores, as a run under torchrun may have
    job = prepare_job(place.recipe("chat", scaling=many), home=place.home, run_id="unplanned", plan=without_cluster)
    assert not (job.folder / PLAN_FILE).exists()
    assert "room for" in next(event["why"] for event in read_events(job.folder) if event["event"] == "not_planned")
    with pytest.raises(ResourceError, match="room for"):
        prepare_job(place.recipe("chat", scaling=many, zero={"stage": "auto"}), home=place.home, run_id="open", plan=without_cluster)
