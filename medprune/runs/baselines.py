"""Is the language model worth its bytes? Its own eyes with a linear head, frozen and tuned, beside what it names."""

import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.results.stats import mean_score, paired_difference
from medprune.tuning.views import centre, seen, wide_pixels

TOWERS = FROZEN, TUNED = "frozen tower, linear head", "tuned tower, linear head"
HISTORY, BOTH = "history alone, linear head", f"{TUNED}, and history"
COLUMNS = ["method", "id", "cluster", "condition", "skin_type", "right"]


def linear_heads(base: str, tuned: str, names: pd.DataFrame, train, test) -> pd.DataFrame:
    """Return a row for each test picture and baseline, right 1 or 0: baselines.csv.

    base: an assembled base's name, whose eyes are as they came; tuned: the folder of a run's own. names: the scores of
    the questions for a name, with id, key, cluster, condition and skin_tone. A head is a logistic regression,
    conditions weighed equally: on the tower's mean token of the training pictures, features of unit variance, C 0.01;
    on the phrases of what patients say (`Record.history`), where records have it, C 1. The two together are the
    product of what they believe: on features that the tower has learned by heart, one head would ask no history.
    """
    believed = {}
    for method, folder in ((FROZEN, prepare_base(base)), (TUNED, tuned)):
        model, processor = load(folder, "cpu")
        tower = parts(model).vision_tower.float()
        features = [
            seen(tower, centre(torch.stack([wide_pixels(processor, r.path) for r in side]), processor)).numpy()
            for side in (train, test)
        ]
        believed[method] = _believed(make_pipeline(StandardScaler(), _head(0.01)), *features, train)
    if any(r.history for r in train):
        phrases = CountVectorizer(analyzer=lambda r: (r.history or "").casefold().strip(".").split(", "), binary=True)
        believed[HISTORY] = _believed(make_pipeline(phrases, _head(1)), train, test, train)
        believed[BOTH] = believed[TUNED] + believed[HISTORY]
    found, wanted = [], names.set_index("key")
    for method, log_p in believed.items():
        rows = wanted.loc[[r.key for r in test]].assign(method=method, said=log_p.idxmax(axis=1).to_numpy())
        rows = rows.assign(right=(rows.said == rows.condition).astype(int)).rename(columns={"skin_tone": "skin_type"})
        found.append(rows[COLUMNS])
    return pd.concat(found, ignore_index=True)


def _head(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=3000, class_weight="balanced")


def _believed(head, known, asked, train) -> pd.DataFrame:
    """Return the log-probability of each condition (column) for each of `asked` (row), of a head taught on `known`."""
    head.fit(known, [r.condition for r in train])
    return pd.DataFrame(head.predict_log_proba(asked), columns=head.classes_)


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each method the pictures named right: percent, 95% limits, balanced accuracy, recall by condition.

    rows: those of `linear_heads`, and the language model's own in the same form. Balanced accuracy is the mean of the
    conditions' recalls. Then how many points more the last method names right than each other, paired by picture:
    gain, gain_low and gain_high.
    """
    wide, table = rows.pivot(index=["id", "cluster"], columns="method", values="right"), []
    last = rows.method.iloc[-1]
    for method, own in rows.groupby("method", sort=False):
        right = mean_score(100 * own.right, own.cluster)
        recalls = 100 * own.groupby("condition").right.mean()
        row = {"method": method, "right": right["mean"], "low": right["low"], "high": right["high"]}
        row |= {"balanced": recalls.mean(), **{f"recall {name}": r for name, r in recalls.items()}}
        if method != last:
            clusters = wide.index.get_level_values("cluster")
            gain = paired_difference(100 * wide[last], 100 * wide[method], clusters)
            row |= {"gain": gain["diff"], "gain_low": gain["low"], "gain_high": gain["high"]}
        table.append(row)
    return pd.DataFrame(table)
