"""What makes rollouts faster changes no rollout: two ranks under ZeRO-3, each setting against the plain one."""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from egrpo_fast import ops
from egrpo_fast.config import TailConfig, TaylorSeerConfig, load_config
from egrpo_fast.distributed.background import BackgroundWorker
from egrpo_fast.distributed.world import free_port
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.rollout import NoiseKey, Wavefront, find_micro_batch
from egrpo_fast.runs.progress import Progress
from egrpo_fast.sampler import Sampler
from egrpo_fast.schedule import make_schedule
from egrpo_fast.train import check_inputs

ROOT = Path(__file__).parents[1]
TINY = [
    "schedule.num_steps=4", "rollout.group_size=3", "prompts.per_iteration=4",
    "optimizer.warmup_steps=0", "optimizer.lr=1e-3", "evaluation.num_prompts=2", "objective.on_error=stop",
    "deepspeed.overrides={zero_optimization: {stage3_param_persistence_threshold: 100}}",
]  # fmt: skip


def assert_alike(ours, theirs, exactly):
    for one, other in zip(ours, theirs, strict=True):
        pairs = [(one.rewards, other.rewards), (one.rollout.final_latents, other.rollout.final_latents)]
        for a, b in pairs:
            assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=0, atol=1e-4)


def out_of_memory_at(trainer, rank, fails):
    """Model calls of one rank fail where `fails(number of the call, rows)` says so. Returns what they were before."""
    plain, calls = trainer.sampler.policy.backbone.velocity, 0

    def velocity(module, latents, *rest):
        nonlocal calls
        calls += 1
        if trainer.world.rank == rank and fails(calls, len(latents)):
            raise torch.OutOfMemoryError("injected")
        return plain(module, latents, *rest)

    trainer.sampler.policy.backbone.velocity = velocity
    return plain


def check_memory(trainer, prompts, plain):
    live = trainer.sampler.wavefront.rows_per_call()
    for failing in (
        len(trainer.sampler.wavefront.plan.waves),
        len(trainer.sampler.wavefront.plan.waves) + 1,
    ):  # the last call; the next prompt's first
        velocity = out_of_memory_at(trainer, 1, lambda call, rows, failing=failing: call == failing)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert_alike(trainer.sampler.sample(prompts), plain, exactly=False)
        said = [str(one.message) for one in told if "out of memory with" in str(one.message)]
        assert len(said) == trainer.world.is_main, told
        assert trainer.sampler.wavefront.micro_batch == live // 2, "on all ranks"
        trainer.sampler.wavefront.micro_batch, trainer.sampler.policy.backbone.velocity = None, velocity

    before = trainer.sampler.config
    trainer.sampler.config = before.model_copy(
        update={"rollout": before.rollout.model_copy(update={"max_rows_per_call": "auto"})}
    )
    velocity = out_of_memory_at(trainer, 1, lambda call, rows: rows > 2)
    assert_alike(trainer.sampler.sample(prompts), plain, exactly=False)
    assert len(set(trainer.world.gather(trainer.sampler.wavefront.micro_batch))) == 1
    assert trainer.sampler.wavefront.micro_batch <= 2, "what the rank that has least memory can take"
    trainer.sampler.config, trainer.sampler.wavefront.micro_batch, trainer.sampler.policy.backbone.velocity = (
        before,
        None,
        velocity,
    )


def check_overlap(trainer, prompts, plain):
    trainer.sampler.beside = BackgroundWorker(trainer.world.device)
    assert_alike(trainer.sampler.sample(prompts), plain, exactly=True)
    working = trainer.sampler.rewards["shapes_soft"]
    trainer.sampler.rewards["shapes_soft"] = lambda images, texts: 1 / 0
    with pytest.raises(ValueError, match=r"rewards\.shapes_soft: ZeroDivisionError"):
        trainer.sampler.sample(prompts)
    trainer.sampler.rewards["shapes_soft"], trainer.sampler.beside = working, None


def check_cached_tail(trainer, prompts, plain):
    """Lent the gathered weights for as long as they are there; a rank without memory has all ask for fewer rows."""
    sampler, policy = trainer.sampler, trainer.policy
    velocity = out_of_memory_at(trainer, 1, lambda call, rows: call == 7)
    policy.use_tail(TailConfig(cache=TaylorSeerConfig(name="taylor_seer", warm_up=100)))  # every step is computed
    policy.load_tail(trainer.world.device)
    model = policy.tail
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_alike(sampler.sample(prompts), plain, exactly=False)
    assert sampler.wavefront.micro_batch == 1, "half of a family of 3"
    assert model.cache.computed == model.cache.asked > 0
    assert all(parameter.is_meta for parameter in model.transformer.parameters())
    policy.tail, sampler.wavefront.micro_batch, policy.backbone.velocity = None, None, velocity


def check_compiled(trainer, prompts, plain):
    from egrpo_fast.models.flux.compiled import CompiledFlux

    graphs, before = torch._dynamo.utils.counters["stats"], trainer.engine._stand_in
    assert before is None
    trainer.engine._stand_in = CompiledFlux.of(trainer.sampler.policy.backbone.transformer, backend="aot_eager")
    batch = trainer.sampler.sample(prompts)
    assert_alike(batch, plain, exactly=False)
    made = graphs["unique_graphs"]
    assert made > 0
    told = trainer.update(batch)
    assert told["policy_mismatch"] < 1e-4, told
    assert told["log_ratio_before_update"] == 0
    following = trainer.sampler.sample(prompts)  # the weights it is lent are the updated ones
    assert not torch.allclose(following[0].rollout.final_latents, batch[0].rollout.final_latents, rtol=0, atol=1e-3)
    trainer.evaluate()
    assert graphs["unique_graphs"] == made, "compiled again"
    assert all(parameter.is_meta for parameter in trainer.engine._stand_in.parameters())
    trainer.engine._stand_in = None
    assert_alike(trainer.sampler.sample(prompts), following, exactly=False)


def main(folder):
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World
    from egrpo_fast.train import make_trainer

    world = World()
    with Heartbeat(world.rank, world.size, group_store(), 300.0) as heart:
        config = load_config("shapes", [*TINY, f"output_dir={folder}"])
        trainer = make_trainer(config, world, heart, *check_inputs(config))
        prompts = trainer.order.iteration(0, 4, world.rank, world.size)
        plain = trainer.sampler.sample(prompts)
        check_memory(trainer, prompts, plain)
        check_overlap(trainer, prompts, plain)
        check_cached_tail(trainer, prompts, plain)
        check_compiled(trainer, prompts, plain)
    world.close()


@pytest.mark.slow
def test_faster_rollouts_are_the_same_rollouts(tmp_path):
    """Out of memory on one of two ranks, at any call; rewards beside the rollout; compiled blocks across an update."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    result = subprocess.run(
        [*launcher, __file__, str(tmp_path / "run")], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


PLAN = e_grpo(make_schedule(4), [3, 3], [1, 1])


def roll_out(rank, agree, micro_batch, fails, sharded=False):
    """`Sampler._roll_out` of one rank. Returns the rollout, its rows per call, and how many calls it made."""
    sampler, calls = Sampler.__new__(Sampler), []
    sampler._world = SimpleNamespace(size=2, is_main=rank == 0, device=torch.device("cpu"), max_on_host=agree)
    sampler._progress = Progress(sampler._world, SimpleNamespace(at=lambda *place: None), SimpleNamespace(signal=0))
    sampler._engine = SimpleNamespace(sharded=sharded)
    sampler.config = load_config("shapes", ["rollout.parameters=sharded"])
    wavefront = Wavefront(PLAN, 1, (6, 8), ops.choose("reference"), micro_batch=micro_batch)

    def velocity(latents, t, rows):
        sampler._progress.check_shutdown()
        calls.append(len(latents))
        if fails(rank, len(calls), len(latents)):
            raise torch.OutOfMemoryError("injected")
        return torch.tanh(latents * (1.5 - t))

    rollout = sampler._roll_out(wavefront, velocity, NoiseKey(7, rank, torch.tensor([5])))
    return rollout.final_latents, wavefront.rows_per_call(), calls


def two_ranks(*arguments, **options):
    """Two threads for two ranks, and a barrier for what they agree on."""
    both, said = threading.Barrier(2, timeout=600), [0, 0]

    def agree(rank, value):
        said[rank] = value
        both.wait()
        largest = max(said)
        both.wait()
        return largest

    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(lambda rank: roll_out(rank, partial(agree, rank), *arguments, **options), range(2)))


@pytest.mark.parametrize("failing", [1, 2, len(PLAN.waves)], ids=["first call", "second", "last"])
@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_on_one_rank_halves_the_rows_of_all(rank, failing):
    plain = two_ranks(None, lambda *call: False)
    with pytest.warns(UserWarning, match="rollout.max_rows_per_call: out of memory with 6 rows per model call"):
        halved = two_ranks(None, lambda *call: call[:2] == (rank, failing))
    for (ours, rows, calls), (theirs, all_rows, all_calls) in zip(halved, plain):
        assert torch.equal(ours, theirs) and (rows, all_rows) == (3, 6)
        assert len(all_calls) == len(PLAN.waves) < len(calls)


def test_out_of_memory_with_one_row_ends_the_run():
    with pytest.raises(torch.OutOfMemoryError, match="injected"), pytest.warns(UserWarning, match="goes on with 1"):
        two_ranks(None, lambda rank, call, rows: True)


def test_out_of_memory_ends_the_run_where_calls_collect_weights():
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        two_ranks(None, lambda rank, call, rows: call == 2, sharded=True)


def test_work_beside_comes_in_order_and_raises_where_it_is_waited_for():
    beside, gate, done = BackgroundWorker(torch.device("cpu")), threading.Event(), []

    def work(name):
        gate.wait(20)
        done.append((name, threading.current_thread() is threading.main_thread()))
        return 1 / len(name)

    waits = [beside.begin(partial(work, name)) for name in ("a", "", "bc")]
    assert not done
    gate.set()
    assert waits[2]() == 0.5 and waits[0]() == 1
    with pytest.raises(ZeroDivisionError):
        waits[1]()
    assert done == [("a", False), ("", False), ("bc", False)]


def test_what_is_done_beside_is_not_told_to_the_heartbeat():
    """It counts what a rank says, and every rank says the same in the same order."""
    said = []
    progress = Progress(
        SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(at=lambda *at: said.append(at)), None
    )
    BackgroundWorker(torch.device("cpu")).begin(partial(progress.at, "rewards"))()
    assert not said
    progress.at("rewards")
    assert said == [("rewards", "(iteration 1)")]


def test_no_memory_to_decode_names_what_to_change():
    sampler = Sampler.__new__(Sampler)
    sampler._progress, sampler.beside = SimpleNamespace(at=lambda *place: None), object()
    sampler.config = load_config("shapes", ["model.decode_batch_size=3"])

    def decode(latents, tiny):
        raise torch.OutOfMemoryError("injected")

    sampler.policy = SimpleNamespace(decode=decode)
    rollout = SimpleNamespace(final_latents=torch.zeros(1, 5, 4, 4))
    with pytest.raises(torch.OutOfMemoryError, match=r"model.decode_batch_size: .* 3 images; .*overlap=false"):
        sampler._score(rollout, ["a"])


def test_the_trial_of_rows_per_call():
    """A device that is busy from 8 rows on, with room for 40."""
    asked = []

    def seconds(rows):
        asked.append(rows)
        if rows > 40:
            raise torch.OutOfMemoryError
        return max(rows, 8.0)

    assert find_micro_batch(seconds, 100) == 8 and asked == [1, 2, 4, 8, 16]
    assert find_micro_batch(lambda rows: seconds(rows) ** 0.5, 100) == 32
    assert find_micro_batch(lambda rows: seconds(rows) ** 0.5, 25) == 25
    assert find_micro_batch(seconds, 1) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.parameters=sharded", "rollout.compile=true"], "rollout.compile: true needs rollout.parameters"),
        (["rollout.parameters=sharded", "rollout.max_rows_per_call=auto"], "rollout.max_rows_per_call: auto needs"),
        (["rollout.max_rows_per_call=all"], "rollout.max_rows_per_call: .*'auto'"),
        (["model.attention=cudnn"], "model.attention: cudnn computes in bfloat16, model.dtype is float32"),
        (["model.attention=sage"], "model.attention: 'sage': Input should be 'native', 'cudnn', 'efficient', 'flash'"),
        (["model.attention=flash", "model.dtype=bfloat16"], "model.attention: flash is not installed: .*flash-attn"),
        (["model.attention=xformers"], "model.attention: xformers is not installed"),
    ],
)
def test_what_cannot_run_is_refused_before_loading(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_inputs(load_config("shapes", [*overrides, f"output_dir={tmp_path / 'run'}"]))


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
