"""Prompt files, and the order in which ranks draw from them."""

from pathlib import Path

import pytest

from egrpo_fast.prompts import PromptOrder, read_prompts

FEW_REAL_PROMPTS = Path(__file__).parent / "data" / "prompts.txt"
ALL_REAL_PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "hpd_test_prompts.txt"


@pytest.fixture(params=[FEW_REAL_PROMPTS, ALL_REAL_PROMPTS], ids=["few", "all"])
def prompt_file(request):
    if not request.param.exists():
        pytest.skip(f"{request.param.name} does not come with the repository")
    return request.param


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_real_prompts_are_drawn_once_per_epoch_over_all_ranks(prompt_file, world_size):
    prompts = read_prompts(prompt_file)
    assert len(prompts) == len([line for line in prompt_file.read_text().splitlines() if line.strip()])
    order, per_iteration = PromptOrder(prompts, seed=3), 8
    drawn = {}
    for iteration in range(3 * len(prompts) // per_iteration):
        ranks = [order.iteration(iteration, per_iteration, rank, world_size) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1, "every rank draws the same number"
        drawn |= {prompt.number: prompt.text for rank in ranks for prompt in rank}
    epochs = [[drawn[number] for number in range(e * len(prompts), (e + 1) * len(prompts))] for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(prompts), "a prompt was repeated or lost"
    assert epochs[0] != epochs[1] != prompts, "not shuffled anew"


def test_the_order_is_a_function_of_seed_and_number():
    prompts = [str(i) for i in range(50)]
    one, same, other = (PromptOrder(prompts, seed) for seed in (1, 1, 2))
    assert [one[n] for n in (120, 3, 99)] == [same[n] for n in (120, 3, 99)], "whatever was asked before"
    assert [one[n].text for n in range(50)] != [other[n].text for n in range(50)]
    assert [PromptOrder(prompts, 1, shuffle=False)[n].text for n in range(50)] == prompts


def test_blank_lines_and_padding_are_dropped(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff\n  a cat \r\n\nzwei Häuser\u2028am Fluss\n   \n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "zwei Häuser\u2028am Fluss"]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\n \n", "holds no prompt"), (b"fine\n\xff\xfe", "not UTF-8 .byte 5."), (None, "cannot read")],
    ids=["empty", "not UTF-8", "missing"],
)
def test_bad_files_are_named(tmp_path, content, told):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.train: .*{told}"):
        read_prompts(path, "prompts.train")
