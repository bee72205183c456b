"""scikit-learn's own checks of an estimator, a pipeline and a DataFrame of mixed columns. Each fit is a job on Ray."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from tests.packages import package

package("sklearn", "sklearn")
pandas = package("pandas", "sklearn")

from sklearn.datasets import make_classification, make_regression  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import estimator_checks_generator  # noqa: E402

from dlopt.sklearn import Classifier, FitError, Regressor  # noqa: E402

QUICK = {"epochs": 20, "batch_size": 16, "optimizer": {"kind": "adam", "lr": 0.02}}
CHECKED = {"model": {"kind": "mlp", "hidden": [16], "dropout": 0.0}, "train": QUICK}


def checks() -> list[Any]:
    found = []
    for estimator in (Classifier(**CHECKED), Regressor(**CHECKED)):
        for made, check in estimator_checks_generator(estimator):
            name = getattr(check, "func", check).__name__
            found.append(pytest.param(made, check, id=f"{type(made).__name__}-{name}-{len(found)}"))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    """All of them, without an exception."""
    check(estimator)


@pytest.mark.usefixtures("ray_cluster")
def test_a_frame_of_mixed_columns_is_fitted_and_survives_pickling() -> None:
    random = np.random.default_rng(1)
    frame = pandas.DataFrame({"x": random.normal(size=200), "town": random.choice(["Rome", "Oslo"], 200)})
    late = np.where((frame.x > 0) ^ (frame.town == "Oslo"), "yes", "no")
    model = Classifier(train=QUICK | {"epochs": 15}).fit(frame, late)
    assert list(model.classes_) == ["no", "yes"] and list(model.feature_names_in_) == ["x", "town"]
    assert model.score(frame, late) > 0.9
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(frame), model.predict_proba(frame))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_pipelines_and_cross_validation() -> None:
    x, y = make_classification(400, 8, random_state=0)
    score = cross_val_score(make_pipeline(StandardScaler(), Classifier(train=QUICK)), x, y, cv=3).mean()
    assert score > cross_val_score(LogisticRegression(), x, y, cv=3).mean() - 0.03
    x, y = make_regression(400, 6, noise=5, random_state=0)
    assert Regressor(train=QUICK | {"epochs": 40}).fit(x, y).score(x, y) > 0.9


def test_one_class_is_refused_before_anything_starts() -> None:
    with pytest.raises(FitError, match="one class only"):
        Classifier().fit(np.zeros((5, 2)), ["a"] * 5)
