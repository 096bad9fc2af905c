"""The figures in README and docs are recounted from recorded measurements and from code, or called not recorded."""

import csv
import importlib.util
import json
import re
import statistics
from math import prod
from pathlib import Path

import pytest

from egrpo_fast.commands import cost
from egrpo_fast.commands.cluster import GIB, GPUS, Cluster
from egrpo_fast.config import ModelConfig, load_config, plan_of
from egrpo_fast.models.folder import configs_of, family_of
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.schedule import make_schedule

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NOT_RECORDED = "not recorded"


def recorded(name):
    return json.loads((RESULTS / name).read_text())


def text(name):
    """A page in one line."""
    return " ".join((ROOT / name).read_text().split())


def tables(page):
    """Header -> rows of cells, of every Markdown table of a page."""
    found, lines = {}, FENCE.sub("", page.read_text()).splitlines()
    for place, line in enumerate(lines):
        if re.fullmatch(r"\|[\s|:-]*-{3}[\s|:-]*", line):
            rows = []
            for row in lines[place + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]])
            found[lines[place - 1]] = rows
    return found


def table(name, header):
    """The one table of a page whose header begins so."""
    (rows,) = (rows for found, rows in tables(ROOT / name).items() if found.startswith(header))
    return rows


# Every table that holds numbers: who recounts it, or why it needs no counting.
ELSEWHERE = {
    ("docs/performance.md", "| Shapes | calls"): "tests/test_docs.py",
    ("docs/performance.md", "| FLUX, 32 M | calls"): "tests/test_docs.py",
    ("docs/performance.md", "| FLUX.1-dev's size | calls"): "tests/test_docs.py",
    ("docs/comparison.md", "| gain of"): "tests/benchmarks/test_studies.py",
    ("docs/configuration.md", "| setting | allowed"): "tests/test_docs.py",
}
HERE = {
    ("README.md", "| | before | after"),
    ("README.md", "| recipe | what it is for | estimated"),
    ("docs/cost.md", "| `--gpu` | TFLOP/s"),
    ("docs/cost.md", "| | estimated GiB"),
    ("docs/flux.md", "| | partition"),
    ("docs/flux.md", "| parameters | run"),
    ("docs/kernels.md", "| kernel | sm_80"),
    ("docs/kernels.md", "| case | triton"),
    ("docs/methods.md", "| `method.name`"),
    ("docs/models.md", "| model | parameters"),
    ("docs/tails.md", "| stride |"),
    ("docs/tails.md", "| tail | evaluations | rollout"),
    ("docs/tails.md", "| tail | evaluations | correlation"),
}
DEFINITIONS = {
    "README.md": ["| to | read |", "| | egrpo_fast |"],
    "docs/commands.md": ["| command |"],
    "docs/architecture.md": ["| file | what it is for", "| folder | what is in it", "| to find | look in"],
    "docs/cost.md": ["| | counted |", "| part | bytes", "| | against | bound |"],
    "docs/evaluation.md": ["| file | what |", "| option of"],
    "docs/extension.md": ["| file | what it is |"],
    "docs/faults.md": ["| fault | what happens", "| what happened |", "| what | fingerprint |"],
    "docs/flux.md": ["| recipe | what is trained", "| `model.quantization` | a weight", "| beside it |"],
    "docs/kernels.md": ["| op | computes"],
    "docs/methods.md": ["| form |"],
    "docs/models.md": ["| family | models", "| recipe | what it trains"],
    "docs/performance.md": ["| setting | what it does"],
    "docs/prompts.md": ["| | what it holds"],
    "docs/python.md": ["| argument | called with"],
    "docs/rewards.md": ["| name | score"],
    "docs/tails.md": ["| setting | what it does"],
}
UNRECORDED = {("docs/faults.md", "| fault | figures |"), ("docs/rewards.md", "| | network alone")}


def test_every_table_of_numbers_is_recounted_or_says_that_it_is_not_recorded():
    """A new table with numbers must get its line here, and with it a source."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for header, rows in tables(page).items():
            if not any(re.search(r"\d", cell) for row in rows for cell in row):
                continue
            known = {start for where, start in (*ELSEWHERE, *HERE, *UNRECORDED) if where == name}
            known |= set(DEFINITIONS.get(name, ()))
            starts = [start for start in known if header.startswith(start)]
            assert len(starts) == 1, f"{name}: which source has the table {header}"
            if (name, starts[0]) in UNRECORDED:
                before = page.read_text().partition(header)[0]
                assert NOT_RECORDED in " ".join(before[before.rindex("\n## ") :].split()), f"{name}: {header}"


def test_learning():
    told = recorded("learning.json")
    rows = table("README.md", "| | before | after")
    assert len(rows) == len(told["rewards"])
    for row, found in zip(rows, told["rewards"].values()):
        digits = 2 if found["ground_truth"] == 1.0 else 3
        mean = [
            f"{statistics.mean(found[at]):.{digits}f} ± {statistics.stdev(found[at]):.{digits}f}"
            for at in ("before", "after")
        ]
        low, high = (f"{end:.0%}" for end in (min(found["share_of_gap_closed"]), max(found["share_of_gap_closed"])))
        assert row[1:] == [*mean, f"{found['ground_truth']:.{digits}f}", f"{low} to {high}"]
    minutes = [sum(phases.values()) / 60 for phases in told["seconds_by_phase"].values()]
    assert f"{min(minutes):.1f} to {max(minutes):.1f} minutes a run" in text("README.md")
    assert told["iterations"] == 100 and "One hundred iterations" in text("README.md")


def test_the_wavefront():
    plan, page = plan_of(load_config("shapes"), 0), text("README.md")
    ratio = plan.evaluations_alone / plan.evaluations
    assert (
        f"{len(plan.image_rows)} images take {plan.evaluations:,} model evaluations in {len(plan.waves)} batched"
        in page
    )
    assert f"take {plan.evaluations_alone:,} evaluations, {ratio:.1f} times as many" in page


def test_the_extension():
    pattern = re.compile(r"^\s*(\d+x\d+) +\w+ +\d+ +\d+ +\d+ +([\d.]+) +([\d.]+) +[\d.]+ +([\d.]+)$", re.MULTILINE)
    found = [
        tuple(map(float, row[1:]))
        for row in pattern.findall((RESULTS / "extension-cpu.txt").read_text())
        if row[0] == "720x720"
    ]
    ours, theirs, ratios = ([round(value) for value in column] for column in zip(*found))
    page = text("docs/extension.md")
    assert f"takes {min(ours)} to {max(ours)} ms" in page and f"takes {min(theirs)} to {max(theirs)} ms" in page
    assert f"{min(ratios)} to {max(ratios)} times as long" in page


def test_the_recipes_estimates():
    shown = {row[0]: row[1:] for row in table("docs/cost.md", "| | estimated GiB")}
    brief = {row[0].strip("`"): row[2] for row in table("README.md", "| recipe | what it is for")}
    assert len(shown) == len(brief) == 5
    for name, (memory, seconds, prompts) in shown.items():
        recipe, nodes, gpus, kind = re.fullmatch(r"`([\w-]+)` on (?:(\d+) x )?(\w+) (\w+)", name).groups()
        config, nodes, gpus = load_config(recipe), int(nodes or 1), 1 if gpus == "one" else int(gpus)
        told = cost.describe(config, Cluster(gpus * nodes, nodes, kind))
        peak, limit = told["memory"]["peak"] / GIB, GPUS[kind].memory / GIB
        assert memory == f"{peak:.1f} of {limit:.1f}" and brief[recipe] == f"{peak:.1f} GiB"
        assert seconds == f"{told['seconds']['total']:.0f}" and prompts == str(config.prompts.per_iteration)


def test_a_quantized_base():
    sizes = Sizes(load_config("flux-dev").model)
    plain, bits = sizes.quantized("int8").parameters * 2 / GIB, {}
    for kind in ("int8", "float8", "nf4"):
        found = sizes.quantized(kind)
        bits[kind] = f"{(found.weights + found.scales) / GIB:.1f} GiB in"
    told = f"take {plain:.1f} GiB in bfloat16, {bits['int8']} 8 bits and {bits['nf4']} nf4"
    assert bits["int8"] == bits["float8"] and told in text("docs/flux.md")


def test_the_gpus():
    rows = table("docs/cost.md", "| `--gpu` |")
    assert [row[0].split()[0] for row in rows] == list(GPUS)
    for row, gpu in zip(rows, GPUS.values()):
        given = [gpu.flops / 1e12, gpu.memory / GIB, gpu.bandwidth / 1e12, gpu.link / 1e9]
        assert [float(cell) for cell in row[1:]] == pytest.approx(given, rel=1e-6)


def test_flux_in_numbers():
    told = cost.describe(load_config("flux-dev"), Cluster(8, 1, "H100"))
    parameters, flops = told["parameters"], told["flops_per_prompt"]
    page = text("docs/cost.md")
    assert f"FLUX.1-dev has {parameters['total']:,} parameters" in page
    assert told["latent_shape"] == (45 * 45, 64) and "720x720 with 512 text tokens" in page
    assert f"is {flops['evaluation'] / 1e12:.1f} TFLOP, {flops['attention'] / 1e12:.1f} of them attention" in page
    iteration = sum(flops[part] for part in ("rollout", "update", "decode"))
    assert f"iteration {iteration / 1e15:.1f} PFLOP, {flops['rollout'] / iteration:.0%} of them rollout" in page
    projection = 2 * 4096 * 3072 * 512 / flops["evaluation"]
    assert f"{projection:.3%} of FLUX.1-dev's {flops['evaluation'] / 1e12:.1f} TFLOP" in text("docs/performance.md")


def test_methods():
    for name, images, evaluations, states, forwards in table("docs/methods.md", "| `method.name`"):
        config = load_config("shapes", [f"method={name.strip('`')}"])
        plans = [plan_of(config, iteration) for iteration in (0, 1, 2, 3, 400)]
        assert {len(plan.image_rows) for plan in plans} == {int(images)}
        found = [plan.evaluations for plan in plans]
        assert evaluations == (f"{found[0]:,}" if len(set(found)) == 1 else f"{found[0]:,} falling to {found[-1]:,}")
        assert {plan.trained_states for plan in plans} == set(map(int, states.split(" or ")))
        assert {len(plan.groups) for plan in plans} == {int(forwards)} and {len(plan.waves) for plan in plans} == {16}


def rho(measured):
    return f"{measured['correlation']:.3f} ± {measured['standard_error']:.3f}"


def by_settings(name):
    return {tuple(sorted(one["settings"].split())): one for one in recorded(name)["tails"]}


def of(found, settings):
    return found[tuple(sorted(settings.split()))]


def test_tails_by_stride():
    found = by_settings("fidelity-shapes.json")
    for stride, evaluations, rollout, *correlations in table("docs/tails.md", "| stride |"):
        tails = [of(found, f"tail.stride={stride} tail.solver={solver}") for solver in ("euler", "ab2", "dpm2m")]
        assert correlations == [rho(tail) for tail in tails]
        assert {evaluations} == {f"{tail['tail_evaluations']:.1%}" for tail in tails}
        speedups = [tail["rollout_speedup"] for tail in tails]
        assert min(speedups) - 0.05 <= float(rollout.removesuffix("x")) <= max(speedups) + 0.05


def test_tails_on_other_prompts():
    int8, strides, seed1 = (recorded(f"fidelity-shapes{name}.json") for name in ("-int8", "-seed1-strides", "-seed1"))
    first, other = by_settings("fidelity-shapes.json"), by_settings("fidelity-shapes-seed1.json")
    composed, cached, ab2 = table("docs/tails.md", "| tail | evaluations | rollout")
    settings = composed[0].strip("`")
    assert composed[3:] == [
        rho(of(by_settings("fidelity-shapes-int8.json"), settings)), rho(int8["suggested"]),
        rho(strides["tails"][0]), rho(strides["suggested"]),
    ]  # fmt: skip
    assert {settings} == {told["settings"] for told in (int8["suggested"], strides["suggested"], strides["tails"][0])}
    settings = cached[0].strip("`")
    assert cached[3:] == [
        rho(of(first, settings)), rho(recorded("fidelity-shapes.json")["suggested"]),
        rho(of(other, settings)), rho(seed1["suggested"]),
    ]  # fmt: skip
    assert ab2[3:] == [rho(of(first, ab2[0].strip("`"))), "", rho(of(other, ab2[0].strip("`"))), ""]
    for row in (composed, cached, ab2):
        assert row[1] == f"{of(other, row[0].strip('`'))['tail_evaluations']:.1%}"
        assert row[2] == f"{of(other, row[0].strip('`'))['rollout_speedup']:.1f}x"
    alone, plain, both = int8["tails"]
    page = text("docs/tails.md")
    assert (
        f"`tail.quantization=int8` alone has {rho(alone)} and a rollout {alone['rollout_speedup']:.2f} times as fast"
        in page
    )
    assert f"first row's strides {rho(both)} and {both['rollout_speedup']:.2f} times" in page
    assert f"float32 have {rho(plain)} and {plain['rollout_speedup']:.2f} times" in page


def test_tails_with_caches():
    found, cache = by_settings("fidelity-shapes-caches.json"), None
    for name, evaluations, correlation, nearest in table("docs/tails.md", "| tail | evaluations | correlation"):
        kind, number, value, stride = re.fullmatch(
            r"(`\w+`,|\.\.\.) (interval|threshold) ([\d.]+)(?:, with stride (\d), `dpm2m`)?", name
        ).groups()
        cache = cache if kind == "..." else kind.strip("`,")
        settings = f"tail.cache.name={cache} tail.cache.{number}={value}"
        settings += " tail.cache.warm_up=1" if cache == "taylor_seer" else ""
        settings += f" tail.stride={stride} tail.solver=dpm2m" if stride else ""
        measured = of(found, settings)
        assert (evaluations, correlation) == (f"{measured['tail_evaluations']:.1%}", rho(measured)), name
        stride, solver = re.match(r"stride (\d), `(\w+)`: ", nearest).groups()
        plain = of(found, f"tail.stride={stride} tail.solver={solver}")
        assert nearest == f"stride {stride}, `{solver}`: {rho(plain)} at {plain['tail_evaluations']:.1%}"
    again = recorded("fidelity-shapes-caches.json")["suggested"]
    assert f"{rho(again)} at {again['tail_evaluations']:.1%}, the cheapest" in text("docs/tails.md")


def test_loading():
    told = recorded("flux-layout-cpu.json")["sizes"]["medium"]["loading"]
    for name, partition, whole, peak, own, others in table("docs/flux.md", "| | partition"):
        ranks = told[name.split()[0]]
        first, rest = ranks[0], [rank["peak_mib"] for rank in ranks[1:]]
        expected = [
            first["partition_mib"],
            first["partition_mib"] + first["largest_shard_mib"],
            first["peak_mib"],
            first["peak_anonymous_mib"],
        ]
        assert [partition, whole, peak, own] == [f"{value:.0f}" for value in expected]
        assert others == (f"{max(rest):.0f}" if rest else "")


def test_layouts():
    sizes = recorded("flux-layout-cpu.json")["sizes"]
    rows = table("docs/flux.md", "| parameters | run")
    assert len(rows) == sum(len(size["runs"]) for size in sizes.values())
    by_count = {f"{size['parameters'] / 1e6:.1f} M": size["runs"] for size in sizes.values()}
    for parameters, run, seconds, peak, apart, in_float32 in rows:
        told = by_count[parameters][run.removesuffix(", all weights")]
        low, high = min(told["seconds_per_iteration"]), max(told["seconds_per_iteration"])
        assert (seconds, peak) == (f"{low:.1f} to {high:.1f}", f"{told['export']['peak_mib']:.0f}")
        for cell, value in ((apart, told["pipeline_differs_by"]), (in_float32, told["its_parts_differ_by"])):
            assert cell == (f"{value:.0e}" if value else "0")


def test_the_soak_run():
    told = recorded("soak-cpu.json")
    (row,) = (row for row in table("docs/faults.md", "| fault | figures |") if row[0].startswith("soak"))
    memory, files, slope = told["memory_mib"], told["open_files"], told["memory_slope_mib_per_1000_iterations"]
    low, high = slope["interval_95"]
    assert row == [
        f"soak, {told['iterations']:,} iterations",
        f"anonymous memory {memory['first_block']:.0f} -> {memory['last_block']:.0f} MiB, {slope['slope']:.0f} +- "
        f"{(high - low) / 2:.0f} MiB per 1,000 iterations; open files {files['first_block']:.0f} -> "
        f"{files['last_block']:.0f}; every line there",
    ]
    assert told["iterations_without_metrics"] == []


def test_registers():
    lines = [json.loads(line) for line in (RESULTS / "registers.jsonl").read_text().splitlines()]
    versions = re.findall(r"registers with Triton (\S+)", text("docs/kernels.md"))
    assert {line["triton"] for line in lines} == set(versions)
    columns = [[str(line["REG"]) for line in lines if line["sm"] == sm] for sm in (80, 90, 100)]
    rows = table("docs/kernels.md", "| kernel | sm_80")
    assert [row[1:] for row in rows] == [list(row) for row in zip(*columns)]
    assert [row[0].split()[0].strip("`") for row in rows] == [line["kernel"] for line in lines if line["sm"] == 80]
    assert all(line["STACK"] == line["LOCAL"] == 0 for line in lines)


H100 = "nvidia-h100-80gb-hbm3"


def test_the_kernels_on_an_h100():
    page = text("docs/kernels.md")
    with (RESULTS / f"{H100}.csv").open(newline="") as file:
        recorded_rows = list(csv.DictReader(file))
    found = {(row["case"], row["tokens"], row["prompts"], row["implementation"]): row for row in recorded_rows}
    rows = table("docs/kernels.md", "| case | triton")
    assert len(rows) == len({row["case"] for row in recorded_rows})
    for case, *microseconds, share in rows:
        for name, told in zip(("triton", "extension", "reference", "eager"), microseconds):
            row = found.get((case.strip("`"), "2025", "1", name))
            assert told == (row["us_median"] if row else ""), (case, name)
        of_copy = float(found[case.strip("`"), "2025", "1", "triton"]["share_of_copy"])
        assert share == (f"{of_copy:.0%}" if of_copy > 0.5 else "")
    for name, told in (("triton", "98% of the copy's bandwidth with Triton"), ("extension", "93% with the extension")):
        assert f"{float(found['branch_rows', '4096', '4', name]['share_of_copy']):.0%}" == told[:3] and told in page
    for row in recorded_rows:
        assert f"{float(row['copy_gb_per_s']) / 1000:.2f} TB/s" in page
    for version in ("torch", "triton", "cuda"):
        assert {row[version].split("+")[0] for row in recorded_rows} == {recorded_rows[0][version].split("+")[0]}
        assert recorded_rows[0][version].split("+")[0] in page


def test_an_iteration_on_an_h100():
    told, page = recorded("iteration-gpu.json")["flux"], text("docs/performance.md")
    exact, compiled = told["variants"]["exact"], told["variants"]["compiled"]
    assert f"in the same run, {told['matmul_peak'] / 1e12:.0f} TFLOP/s" in page
    assert f"from {exact['share_of_peak']:.0%} to {compiled['share_of_peak']:.0%} of that peak" in page
    apart = compiled["seconds"]["update"] - exact["seconds"]["update"]
    assert f"differs by {apart:.1f} seconds" in page
    rates = [told["flops_per_evaluation"] * row["evaluations"] / row["seconds"]["rollout"] for row in (exact, compiled)]
    shares = [f"{rate / 1e12:.0f} TFLOP/s, {rate / GPUS['H100'].flops:.0%}" for rate in rates]
    for told in (f"ran at {shares[0]} of the data sheet's", f"at {shares[1]}, with `rollout.compile`"):
        assert told in text("docs/cost.md")
    milliseconds = dict(
        re.findall(r"attention 16x24x2537x128 (\w+)_ATTENTION forward (\S+) ms", (RESULTS / f"{H100}.txt").read_text())
    )
    flash, cudnn, efficient = (float(milliseconds[name]) for name in ("FLASH", "CUDNN", "EFFICIENT"))
    assert f"flash {flash:.1f} ms, cuDNN {cudnn:.1f} ms, memory-efficient {efficient:.1f} ms" in page
    assert f"about {round(57 * (flash - cudnn), -1):.0f} ms of a 16-row call" in page


def test_the_peak_of_a_core():
    told, page = recorded("iteration-cpu.json")["shapes"], text("docs/performance.md")
    exact, compiled = told["variants"]["exact"], told["variants"]["compiled"]
    assert (
        f"{exact['ratio']:.1f} times as fast as one image at a time, and {compiled['ratio']:.1f} times with" in page
    )
    assert f"{exact['share_of_peak']:.0%} and {compiled['share_of_peak']:.0%} of what a large matrix product" in page
    assert f"same core, {told['matmul_peak'] / 1e9:.0f} GFLOP/s" in page
    assert f"is {told['flops_per_evaluation'] / 1e9:.3f} GFLOP" in page


def studies():
    spec = importlib.util.spec_from_file_location("studies", ROOT / "benchmarks" / "studies.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_what_comparison_tells_beside_its_tables():
    """Every number with three decimals there is a gain, its interval or a difference of gains that was recorded."""
    module, known = studies(), set()
    for name in ("compare.json", "ablations.json"):
        cells = recorded(name)["cells"]
        for cell in cells.values():
            for reward in ("shapes_soft", "clip", "shapes_strict"):
                gains, base = module.gains(cell, reward), module.gains(cells["e_grpo"], reward)
                apart = [one - other for one, other in zip(gains, base)]
                known |= {f"{abs(statistics.mean(values)):.3f}" for values in (gains, apart)}
                known |= {f"{module.interval(values):.3f}" for values in (gains, apart)}
    page = (ROOT / "docs" / "comparison.md").read_text()
    told = re.sub(r"<!-- (\w+): written.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    tails = text("docs/tails.md").partition("Training with the first row's strides")[2].partition("Caches,")[0]
    for prose in (told, tails):
        numbers = re.findall(r"\d\.\d{3}\b", prose)
        assert numbers and not set(numbers) - known


def test_gains_on_the_way():
    """`comparison.md` compares methods after equal numbers of optimizer steps, to two decimals."""
    module, cells = studies(), recorded("compare.json")["cells"]

    def gain(name, iteration):
        cell = cells[name]
        return f"+{statistics.mean(module.gains(cell, 'shapes_soft', cell['seeds'][0]['at'].index(iteration))):.2f}"

    page = text("docs/comparison.md")
    assert f"MixGRPO (+0.159 after 24, {gain('mix_grpo', 28)} after 28)" in page
    assert (
        gain("granular_grpo", 15) == gain("tempflow_grpo", 16)
        and f"({gain('granular_grpo', 15)} after 15 and 16" in page
    )
    assert f"between {gain('e_grpo', 12)} at 12 and {gain('e_grpo', 18)} at 18" in page


def test_states_of_caches_at_the_size_of_flux():
    """Bytes a row, by the formulas of `docs/cost.md`: bfloat16, 720x720, 512 tokens of text."""
    image, both, width, channels = 2025, 2025 + 512, 3072, 64
    page = text("docs/tails.md")
    assert (
        f"57 blocks of {both:,} tokens of {width:,} numbers at two orders are {57 * both * width * 2 * 2 / 1e9:.1f} GB"
        in page
    )
    assert f"a row's state is {2 * image * channels * 2 / 1e6:.1f} MB" in page


def test_bytes_of_stored_samples():
    """Sample 4, state 4 and velocity 2 are read for each of two densities and one backward, which writes 2."""
    assert f"move {10 + 10 + 12} G bytes instead of {4 + 6}" in text("docs/kernels.md")
    latents = Sizes(load_config("flux-dev").model).backbone.latent_shape
    samples = sum(group.size for group in plan_of(load_config("flux-dev"), 0).groups)
    assert f"{samples * prod(latents) * 4 / 1e6:.0f} MB for {samples} samples" in text("docs/kernels.md")


def test_the_models():
    """The table is the script's of its record; two models of it are counted again, and the entropies told beside it."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = recorded("models.json")["models"]
    assert script.table(found) in (ROOT / "docs" / "models.md").read_text()
    for path in ("stabilityai/stable-diffusion-3.5-medium", "Tongyi-MAI/Z-Image"):
        assert script.measure(path) == found[path]
    for path, steps, told in (
        ("black-forest-labs/FLUX.2-klein-4B", 4, "2.89, 3.77, 3.26 and 3.91"),
        ("Tongyi-MAI/Z-Image-Turbo", 8, "2.89, 3.10, 2.24 and 1.87"),
    ):
        folder = configs_of(path)
        model = ModelConfig(path=path, height=512, width=512)
        schedule = make_schedule(steps, family_of(folder).times(folder, model, steps))
        *first, last = (f"{schedule.entropy(index, 1):.2f}" for index in range(4))
        assert f"{', '.join(first)} and {last}" == told and told in text("docs/models.md")
        assert schedule.merges[:4] == ((1,) * 4 if steps == 4 else (1, 1, 1, 2))
    klein = make_schedule(4, family_of(configs_of("black-forest-labs/FLUX.2-klein-4B")).times(
        configs_of("black-forest-labs/FLUX.2-klein-4B"), ModelConfig(path="x", height=512, width=512), 4))  # fmt: skip
    assert f"a noise of {klein.sde(3, 1).s:.2f}" in text("docs/models.md")


def test_counts():
    plan = plan_of(load_config("shapes"), 0)
    told = f"rollout of {plan.evaluations:,} model evaluations {plan.tail_evaluations} are of tails"
    assert told in text("docs/tails.md")
    lines = len((ROOT / "tests" / "methods" / "toy_method.py").read_text().splitlines())
    assert all(f"in {lines} lines" in text(page) for page in ("docs/methods.md", "docs/extending.md"))
    lines = len((ROOT / "tests" / "models" / "toy_family.py").read_text().splitlines())
    assert f"a whole one of {lines} lines" in text("docs/extending.md")
