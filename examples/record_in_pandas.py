"""A record of IRP opened with h5py and pandas: one row a weight, what it looked like at initialization, how long it survived.

autosparse generate configs/irp/digits.yaml
python examples/record_in_pandas.py runs/irp-digits/records/*.h5
"""

import sys
from pathlib import Path

import h5py
import pandas as pd


def read(path: Path) -> pd.DataFrame:
    """One row a weight: layer, every signal, and survival, the number of rounds that it stayed."""
    tables = []
    with h5py.File(path) as file:
        for name, layer in file["layers"].items():
            columns = {key: values[()].ravel() for key, values in layer.items()}
            tables.append(pd.DataFrame({"layer": name, **columns}))
    return pd.concat(tables, ignore_index=True)


def rounds(path: Path) -> pd.DataFrame:
    """One row a training: density, accuracy, loss."""
    with h5py.File(path) as file:
        return pd.DataFrame({key: values[()] for key, values in file["rounds"].items()})


def main(*paths: str) -> pd.DataFrame:
    weights = pd.concat([read(Path(path)).assign(record=Path(path).stem) for path in paths], ignore_index=True)
    print(rounds(Path(paths[0])).round(4).to_string())
    weights["size"] = weights["weight"].abs()
    by_layer = weights.groupby("layer", sort=False)
    summary = by_layer.agg(weights=("size", "size"), survival=("survival", "mean"))
    # Within a layer: do weights that are large at initialization survive longer?
    summary["rank correlation with |θ₀|"] = by_layer[["size", "survival"]].apply(
        lambda table: table["size"].corr(table["survival"], method="spearman")
    )
    print(summary.round(3).to_string())
    return summary


if __name__ == "__main__":
    main(*sys.argv[1:])
