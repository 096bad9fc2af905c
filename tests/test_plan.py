"""The wavefront's rows, edges and calls, counted by hand."""

from dataclasses import replace

import pytest
import torch

from egrpo_fast.methods.branch_grpo import branch_grpo
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.noise import draw_word
from egrpo_fast.plan import ANCHOR, Edge, Plan, PlanBuilder, PlanTooLargeError, Wave, ode_plan, tail_grid
from egrpo_fast.schedule import AffineStep, make_schedule

ODE, SDE = AffineStep(1, 0, 0), AffineStep(1, 0, 0.5)


def plan_of(group_sizes=12, tail_strides=1, solver="euler", **schedule):
    made = make_schedule(**schedule)
    sizes, strides = ([each] * len(made.active) for each in (group_sizes, tail_strides))
    return e_grpo(made, sizes, strides, solver=solver)


def test_the_papers_setting():
    plan = plan_of()
    rows = [len(wave.sources) for wave in plan.waves]
    assert rows == [1, 13, 25, 25, 37, 49, 61, 61, 72, 84, 96, 96, 96, 96, 96, 96]
    assert plan.evaluations == 8 + 996 and plan.num_rows == 97


def test_the_anchor_stops_after_its_last_active_step():
    assert [ANCHOR in wave.sources for wave in plan_of().waves] == [True] * 8 + [False] * 8


def test_small_plan_by_hand():
    """T = 4, steps 0 and 2 active, merges 1 and 2, groups of 2 and 3, the first group's tail of stride 2."""
    schedule = make_schedule(4, merge_lengths=[1, 1, 2, 1], active_steps=[0, 2])
    plan = e_grpo(schedule, [2, 3], [2, 1])
    moves = [[(edge.source, edge.destination) for edge in wave.edges] for wave in plan.waves]
    assert moves == [
        [(0, 0), (0, 1), (0, 2)],  # anchor steps on, two branches leave
        [(0, 0), (1, 1), (2, 2)],  # the branches stride over grid step 2
        [(0, 3), (0, 4), (0, 5)],  # the anchor's last velocity serves three branches, merged to the end
        [(1, 1), (2, 2)],
    ]
    assert plan.waves[2].edges[0] == Edge(0, 3, schedule.sde(2, 2), draw_word(2, 0))
    assert plan.waves[1].edges[1].step == schedule.ode(1, 3)
    assert plan.image_rows == (1, 2, 3, 4, 5)
    assert [group.views for group in plan.groups] == [(((1,), (2,)),), (((3,), (4,), (5,)),)]


def test_tables_of_several_prompts_are_the_one_prompt_table_shifted():
    plan = plan_of()
    for one, two in zip(plan.tables(1, "cpu", torch.float32), plan.tables(2, "cpu", torch.float32)):
        half = len(one.destinations)
        assert torch.equal(two.destinations[half:], one.destinations + plan.num_rows)
        assert torch.equal(two.sources[len(one.sources) :], one.sources + plan.num_rows)
        assert torch.equal(two.draws[half:], one.draws) and torch.equal(two.coefficients[half:], one.coefficients)
        assert two.slots.tolist() == [0] * half + [1] * half
        assert two.offsets[-1] == 2 * half


def test_tails_by_hand():
    """As above: a row is in its tail once its stochastic step is behind it; the anchor never is."""
    schedule = make_schedule(4, merge_lengths=[1, 1, 2, 1], active_steps=[0, 2])
    assert [sorted(rows) for rows in e_grpo(schedule, [2, 3], [2, 1]).tails] == [[], [1, 2], [], [1, 2]]
    assert not any(ode_plan(schedule).tails)
    tree = branch_grpo(make_schedule(4, entropy_threshold=0), [0, 1], 2, [0, 1])
    assert [sorted(rows) for rows in tree.tails] == [[], [], [], [0, 1, 2, 3]]
    assert plan_of().tail_evaluations == plan_of().evaluations - 8


def test_a_tails_history_begins_with_its_second_step():
    plan = plan_of(group_sizes=2, tail_strides=3, num_steps=8, active_steps=[0], merge_lengths=1, solver="ab2")
    t, steps = plan.schedule.times, [edge for wave in plan.waves for edge in wave.edges if edge.source == 1]
    assert [edge.history for edge in steps] == [0, (t[4] - t[7]) / (2 * (t[1] - t[4])), t[7] / (2 * (t[4] - t[7]))]


def test_history_is_refused_outside_of_a_tail():
    plan = plan_of(group_sizes=2, num_steps=4, active_steps=[0, 2], merge_lengths=1, solver="ab2")

    def broken(index, row):
        waves = list(plan.waves)
        edges = tuple(replace(edge, history=0.5) if edge.source == row else edge for edge in waves[index].edges)
        waves[index] = replace(waves[index], edges=edges)
        return replace(plan, waves=tuple(waves))

    broken(2, 1)  # the second step of a tail
    for index, row in ((1, ANCHOR), (2, ANCHOR), (1, 1), (3, 3)):  # the anchor, SDE steps, first steps of tails
        with pytest.raises(ValueError, match="history outside of a tail"):
            broken(index, row)


def test_tail_grid():
    assert tail_grid(3, 16, 1) == list(range(3, 17))
    assert tail_grid(3, 16, 4) == [3, 7, 11, 15, 16]
    assert tail_grid(16, 16, 4) == [16]


def test_ode_plan():
    plan = ode_plan(make_schedule(5))
    assert (plan.num_rows, plan.evaluations, plan.image_rows, plan.evaluations_alone) == (1, 5, (ANCHOR,), 5)


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ((Edge(0, 1, ODE), Edge(0, 1, ODE)), "overlapping destinations"),
        ((Edge(0, 1, ODE), Edge(1, 2, ODE)), "a source overwritten before it is read"),
        ((Edge(0, 9, ODE),), "row outside the plan"),
        ((), "no row is live"),
        ((Edge(0, 1, SDE, 7), Edge(0, 2, SDE, 7)), "two samples have the same noise"),
        ((Edge(0, 0, SDE, 7), Edge(1, 1, SDE, 7)), "two samples have the same noise"),
        ((Edge(0, 0, SDE, 7), Edge(0, 1, SDE, 8, -1)), "a mirror without its twin"),
        ((Edge(0, 0, ODE), Edge(0, 1, ODE, history=0.5)), "a source with two velocities"),
    ],
)
def test_a_plan_that_would_clash_is_refused(edges, told):
    with pytest.raises(ValueError, match=f"plan: grid step 1: {told}"):
        Plan(make_schedule(2), 3, (Wave(1, 1.0, edges),), ())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"views": (((0,), (1,), (2,)),)}, "a view of more or fewer samples"),
        ({"draws": (9, 10)}, "a sample that no edge makes"),
        ({"index": 1}, "a sample that no edge makes"),
        ({"sources": (0, 1, 2)}, "states left by different numbers of samples"),
        ({"sources": ()}, "states left by different numbers of samples"),
        ({"signs": (1,)}, "states left by different numbers of samples"),
        ({"views": (((0,), (1,)), ((0,), (0,)))}, "an image compared with two different sets"),
    ],
)
def test_a_group_that_is_no_group_is_refused(changes, told):
    plan = plan_of(group_sizes=2, num_steps=3, active_steps=[0], merge_lengths=1)
    with pytest.raises(ValueError, match=f"plan: .*{told}"):
        replace(plan, groups=(replace(plan.groups[0], **changes),))
    with pytest.raises(ValueError, match="plan: groups not increasing by grid index"):
        replace(plan, groups=plan.groups * 2)


@pytest.mark.parametrize("keep", [False, True])
def test_samples_of_one_step_that_are_drawn_twice_are_refused(keep):
    """The second draw would hand out the noise of the first."""
    draft = PlanBuilder(make_schedule(3, merge_lengths=1))
    first, second = draft.start(0), draft.start(1)
    draft.sde([first], 0, 2, keep=keep)
    draft.sde([second], 0, 2, keep=keep)
    with pytest.raises(ValueError, match="grid step 0: two samples have the same noise; draw all samples of a step at"):
        draft.plan()


def test_a_plan_that_no_memory_holds_is_refused_before_it_is_drawn():
    draft = PlanBuilder(make_schedule(1000, merge_lengths=1))
    rows = draft.sde([draft.start()], 0, 65536).rows
    with pytest.raises(PlanTooLargeError, match="more than 2,000,000 steps of samples"):
        draft.ode(rows, 1, 1000)
