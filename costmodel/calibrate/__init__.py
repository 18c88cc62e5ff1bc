"""Measurements → Hardware: refit the constants of the paper's machine and say how well they predict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from costmodel.calibrate.fit import T4_FLEXGEN, Constant, fit
from costmodel.calibrate.published import Ablation, Run, ablations, predict, runs
from costmodel.formulations import get
from costmodel.hardware import Hardware

SCHEMA = "tierwise.calibration/1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prediction beside what was published (token/s); ``error`` is relative, predicted / published − 1."""

    name: str
    published_tok_per_s: float
    predicted_tok_per_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_tok_per_s / self.published_tok_per_s - 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The fitted machine, and the errors that make its claim checkable.

    ``in_sample`` was fitted to; in ``left_out`` each row was predicted by a fit to the other rows;
    ``decode`` and ``ablations`` were never fitted to; ``flexgen`` is the published model on the same rows.
    """

    hardware: Hardware
    constants: tuple[tuple[Constant, float], ...]
    in_sample: tuple[Row, ...]
    left_out: tuple[Row, ...]
    decode: tuple[Row, ...]
    ablations: tuple[Row, ...]
    flexgen: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: constants, and every table with its errors."""

        def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
            return [
                {
                    "run": row.name,
                    "published_tok_per_s": row.published_tok_per_s,
                    "predicted_tok_per_s": row.predicted_tok_per_s,
                    "error": row.error,
                }
                for row in rows
            ]

        return {
            "schema": SCHEMA,
            "constants": [
                {
                    "name": c.name,
                    "path": c.path,
                    "attribute": c.attribute,
                    "value": value,
                    "prior": c.prior,
                    "upper": c.upper,
                    "why": c.why,
                }
                for c, value in self.constants
            ],
            **{name: table(getattr(self, name)) for name in TABLES},
            "mean_error_in_sample": mean_error(self.in_sample),
            "mean_error_left_out": mean_error(self.left_out),
            "worst_error_left_out": worst_error(self.left_out),
        }


TABLES = ("in_sample", "left_out", "decode", "ablations", "flexgen")


def mean_error(rows: Sequence[Row]) -> float:
    """Mean of the absolute relative errors."""
    return fmean(abs(row.error) for row in rows)


def worst_error(rows: Sequence[Row]) -> float:
    """Largest absolute relative error."""
    return max(abs(row.error) for row in rows)


def calibrate(
    hardware: Hardware,
    *,
    constants: Sequence[Constant] = T4_FLEXGEN,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Fit the roofline constants to the published runs and predict what was not fitted.

    ``progress`` is called with the fits done and their number.
    """
    roofline, flexgen = get("roofline"), get("flexgen")
    fitted = fit(hardware, runs(), roofline, constants)
    left_out = []
    for i, run in enumerate(runs()):
        if progress is not None:
            progress(i + 1, len(runs()) + 1)
        others = [*runs()[:i], *runs()[i + 1 :]]
        left_out.append(_row(run, fit(hardware, others, roofline, constants)))
    return Calibration(
        hardware=fitted,
        constants=tuple((constant, constant.of(fitted)) for constant in constants),
        in_sample=tuple(_row(run, fitted) for run in runs()),
        left_out=tuple(left_out),
        decode=tuple(
            Row(
                name=run.name,
                published_tok_per_s=run.decode_throughput_tok_per_s,
                predicted_tok_per_s=predict(run, fitted, roofline)[1],
            )
            for run in runs()
            if run.decode_throughput_tok_per_s is not None
        ),
        ablations=tuple(_ablation(ablation, fitted) for ablation in ablations()),
        flexgen=tuple(
            Row(
                name=run.name,
                published_tok_per_s=run.throughput_tok_per_s,
                predicted_tok_per_s=predict(run, fitted, flexgen)[0],
            )
            for run in runs()
        ),
    )


def _row(run: Run, hardware: Hardware) -> Row:
    predicted = predict(run, hardware, get("roofline"))[0]
    return Row(name=run.name, published_tok_per_s=run.throughput_tok_per_s, predicted_tok_per_s=predicted)


def _ablation(ablation: Ablation, hardware: Hardware) -> Row:
    assert ablation.published_tok_per_s is not None
    row = _row(ablation.run, hardware)
    return Row(
        name=f"{ablation.run.model.name} {ablation.variant}",
        published_tok_per_s=ablation.published_tok_per_s,
        predicted_tok_per_s=row.predicted_tok_per_s,
    )


__all__ = ["Calibration", "Constant", "Row", "calibrate", "mean_error", "worst_error"]
