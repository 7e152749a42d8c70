"""README's figures of the study are those of results/study, as rounded."""

import pandas as pd
import pytest

from medprune.results import page
from medprune.settings import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")


def table(name: str, index: str | list[str]) -> pd.DataFrame:
    return pd.read_csv(REPO / "results" / "study" / f"{name}.csv").set_index(index)


def limits(row, digits: int = 1) -> str:
    return page.limits(row.low, row.high, digits)


def turned(row) -> pd.Series:
    """Return a paired difference the other way round."""
    return pd.Series({"diff": -row["diff"], "low": -row.high, "high": -row.low})


def step(a: str, b: str) -> pd.Series:
    return STEPS.loc[(a, b)]


STEPS = table("Step against step", ["a", "b"])
METHODS = table("Methods", "method")
NAMES = table("Names given right", "method")
FOUND = table("The plan found by the budget search", "b")
PAIRED = table("Judge's score against the original", "a")
CRITERIA = table("Criteria", "criterion")
WAYS = table("Ways back", "way back").rename(lambda way: way.split(" ")[0])
EXTRA = table("What 4 bits cost a pruned model more", "method")


@pytest.mark.parametrize(
    "method", ["original", "pruned-2", "recovered-2", "awq-original", "awq-pruned-2", "awq-recovered-2", "found"]
)
def test_a_row_of_the_first_table(method):
    row = METHODS.loc[method]
    score, weight = f"{row.score:.1f} {limits(row)}", f"| {row.weight_bytes / 2**20:.0f} |"
    lines = [line for line in README.splitlines() if f" | {method} | " in line]
    assert any(score in line and line.endswith(weight) for line in lines), f"{score} {weight}: {lines}"


CALLED = {
    "logit_divergence": "logit divergence",
    "greedy": "greedy re-scoring",
    "magnitude": "magnitude",
    "perplexity": "perplexity",
    "output_similarity": "output similarity, the paper's,",
    "block_influence": "ShortGPT's block influence",
}


def said() -> list[str]:
    """Return what README says of the study, made from its tables."""
    pipeline, whole, original = FOUND.loc["awq-recovered-2"], FOUND.loc["awq-original"], turned(PAIRED.loc["found"])
    uniform, primary = METHODS.loc["uniform"], step("awq-recovered-2", "awq-magnitude-2")
    names, chosen = NAMES.loc["original"], NAMES.loc["awq-recovered-2"]
    pruned, recovered = turned(PAIRED.loc["pruned-2"]), step("recovered-2", "pruned-2")
    projector, images = WAYS.loc["projector"], step("awq-recovered-2", "awq_text-recovered-2")
    leads = {name: step("awq-original", f"{name}-original") for name in ("bnb", "rtn", "hqq")}
    last, four = step("awq-recovered-2", "bnb-recovered-2"), step("awq-recovered-2", "awq-pruned-2")
    cost, fewer = turned(PAIRED.loc["awq-original"]), {name: turned(row) for name, row in EXTRA.iterrows()}
    score, beaten = CRITERIA.score, CRITERIA.beaten.str.removesuffix(" of 20")
    return [
        f"{pipeline['diff']:.1f} points ahead of the pipeline {limits(pipeline)}**",
        f"{whole['diff']:.1f} ahead of AWQ of the whole model {limits(whole)}",
        f"{original['diff']:.1f} behind the original {limits(original)}",
        f"has {uniform.score:.1f} {limits(uniform)}",
        f"of the same bytes, has {METHODS.score['best-random']:.1f}",
        f"{primary['diff']:.1f} points {limits(primary)}, p = {primary.p:.2f}",
        f"for {names.right:.0f}% {limits(names, digits=0)} of the test images",
        ", ".join(f"{CALLED[key]} {score[key]:.0f}" for key in score.index if key in CALLED),
        f"Random orders have {score['random']:.0f} on average",
        *(" and ".join(beaten[key].rsplit(", ", 1)) for key in ("output_similarity", "logit_divergence", "magnitude")),
        f"cost {pruned['diff']:.0f} points {limits(pruned, digits=0)}",
        f"brings back {recovered['diff']:.0f} {limits(recovered, digits=0)} of them",
        f"Distillation ({WAYS.score['distill']:.1f}), LoRA ({WAYS.score['lora']:.1f})",
        f"the last three blocks ({WAYS.score['last_blocks']:.1f})",
        f"comes to {projector.score:.1f}, less than LoRA by {-projector['diff']:.1f} "
        f"({-projector.high_all:.0f} to {-projector.low_all:.0f}, for all rows)",
        f"it leads NF4 by {leads['bnb']['diff']:.1f} points {limits(leads['bnb'])}",
        f"rounding by {leads['rtn']['diff']:.1f} {limits(leads['rtn'])}",
        f"HQQ by {leads['hqq']['diff']:.1f} {limits(leads['hqq'])}",
        f"of the recovered model NF4 by {last['diff']:.1f} {limits(last)}",
        f"is {four['diff']:.1f} points {limits(four)} ahead of the pruned one",
        f"costs {cost['diff']:.1f} {limits(cost)}",
        f"{EXTRA.loc['awq', 'diff']:.1f} more with AWQ {limits(EXTRA.loc['awq'])}",
        f"{fewer['bnb']['diff']:.1f} with NF4 {limits(fewer['bnb'])}",
        f"{fewer['hqq']['diff']:.1f} with HQQ {limits(fewer['hqq'])}",
        f"{fewer['rtn']['diff']:.1f} with rounding {limits(fewer['rtn'])}",
        f"{images['diff']:.1f} points {limits(images)} against text alone",
        f"names {chosen.right:.0f}% {limits(chosen, digits=0)} right, where its open answers fall from "
        f"{METHODS.open['original']:.0f} to {METHODS.open['awq-recovered-2']:.0f}",
    ]


@pytest.mark.parametrize("words", said())
def test_a_sentence(words):
    assert words in README
