"""The wavefront's rows, edges and calls, counted by hand."""

import pytest
import torch

from egrpo_fast.methods import e_grpo
from egrpo_fast.noise import draw_word
from egrpo_fast.plan import ANCHOR, Edge, Plan, Wave, ode_plan, tail_grid
from egrpo_fast.schedule import AffineStep, make_schedule


def plan_of(group_sizes=12, tail_strides=1, **schedule):
    made = make_schedule(**schedule)
    return e_grpo(made, [group_sizes] * len(made.active), [tail_strides] * len(made.active))


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
    assert plan.picture_rows == (1, 2, 3, 4, 5)
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


def test_tail_grid():
    assert tail_grid(3, 16, 1) == list(range(3, 17))
    assert tail_grid(3, 16, 4) == [3, 7, 11, 15, 16]
    assert tail_grid(16, 16, 4) == [16]


def test_ode_plan():
    plan = ode_plan(make_schedule(5))
    assert (plan.num_rows, plan.evaluations, plan.picture_rows, plan.evaluations_alone) == (1, 5, (ANCHOR,), 5)


@pytest.mark.parametrize(
    "edges",
    [
        pytest.param((Edge(0, 1, AffineStep(1, 0, 0)), Edge(0, 1, AffineStep(1, 0, 0))), id="overlapping destinations"),
        pytest.param((Edge(0, 1, AffineStep(1, 0, 0)), Edge(1, 2, AffineStep(1, 0, 0))), id="source overwritten"),
        pytest.param((Edge(0, 9, AffineStep(1, 0, 0)),), id="row outside"),
        pytest.param((), id="empty wave"),
    ],
)
def test_a_plan_that_would_clash_is_refused(edges):
    with pytest.raises(AssertionError):
        Plan(make_schedule(2), 3, (Wave(0, 1.0, edges),), ())
