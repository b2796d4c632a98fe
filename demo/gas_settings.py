"""GNNAutoScale's small benchmark (Fey et al., ICML 2021): hyper-parameters of every cell, and published accuracies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Setting:
    """How one model is trained on one dataset.

    Attributes
    ----------
    model, dataset : str
        The cell.
    layers, hidden : int
        Depth, and width of the hidden layers; of GAT, of each head.
    dropout, lr : float
        Fraction dropped out, and learning rate.
    decay : (float, float)
        Weight decay of the regularised modules, and of the others.
    epochs, runs : int
        How long a training takes, and how many there are.
    parts : (int, int)
        How many parts the graph is cut into, and how many of them make a batch.
    clip : bool
        Whether gradients are clipped to norm 1.
    heads : (int, int)
        Of GAT: hidden heads and output heads.
    alpha, theta : float
        Of APPNP and GCNII.
    """

    model: str
    dataset: str
    layers: int
    hidden: int
    dropout: float
    lr: float
    decay: tuple[float, float]
    epochs: int
    runs: int
    parts: tuple[int, int]
    clip: bool = False
    heads: tuple[int, int] = (8, 1)
    alpha: float = 0.1
    theta: float = 0.5


    def make(self, models: ModuleType, in_channels: int, out_channels: int) -> Any:
        """Return a model with new parameters, of a module that has a class for each."""
        sizes = (in_channels, self.hidden, out_channels, self.layers)
        extra: dict[str, dict[str, Any]] = {
            "gcn": {},
            "gat": dict(zip(("heads", "out_heads"), self.heads, strict=True)),
            "appnp": {"alpha": self.alpha},
            "gcnii": {"alpha": self.alpha, "theta": self.theta},
        }
        return getattr(models, self.model.upper())(*sizes, **extra[self.model], dropout=self.dropout)


class Accuracy(NamedTuple):
    """Percent: mean and standard deviation over runs."""

    mean: float
    std: float


# A line with * holds what a model's cells share; the others add to it or override it.
_SETTINGS = """
gcn    *                  layers=2 dropout=.5 lr=.01 epochs=200 runs=20
gcn    cora               hidden=16 decay=5e-4/0 parts=40/10 clip
gcn    citeseer           hidden=16 decay=5e-4/0 parts=24/8
gcn    pubmed             hidden=16 decay=5e-4/0 parts=8/4 clip
gcn    coauthor_cs        hidden=64 decay=1e-3/0 parts=2/1 clip
gcn    coauthor_physics   hidden=64 decay=1e-3/0 parts=4/2
gcn    amazon_computers   hidden=64 decay=1e-3/0 parts=32/16 clip
gcn    amazon_photo       hidden=64 decay=1e-3/0 parts=32/16
gcn    wiki_cs            hidden=33 decay=5e-4/0 parts=32/16 clip dropout=.25 lr=.02

gat    *                  layers=2 hidden=8 heads=8/1 dropout=.6 epochs=400 runs=20
gat    cora               lr=.005 decay=5e-4/0 parts=40/10 clip
gat    citeseer           lr=.005 decay=5e-4/0 parts=24/8
gat    pubmed             lr=.01 decay=1e-3/0 parts=4/1 heads=8/8
gat    coauthor_cs        lr=.005 decay=.01/0 parts=8/2
gat    coauthor_physics   lr=.005 decay=.01/0 parts=4/1
gat    wiki_cs            lr=.007 decay=5e-4/0 parts=2/1 hidden=14 heads=5/1 dropout=.5

appnp  *                  layers=10 hidden=64 dropout=.5 lr=.01 decay=.005/0 epochs=600 runs=20
appnp  cora               alpha=.1 parts=4/2
appnp  citeseer           alpha=.1 parts=24/6 clip
appnp  pubmed             alpha=.1 parts=4/2 clip
appnp  coauthor_cs        alpha=.2 parts=32/16
appnp  coauthor_physics   alpha=.2 parts=2/1 clip
appnp  amazon_computers   alpha=.2 parts=4/2
appnp  amazon_photo       alpha=.2 parts=16/8 clip
appnp  wiki_cs            alpha=.11 parts=4/2 layers=2 dropout=.4 lr=.02 decay=5e-4/0

gcnii  *                  lr=.01 alpha=.1 theta=.5 decay=.01/5e-4 epochs=1000 runs=10
gcnii  cora               layers=64 hidden=64 dropout=.6 parts=2/1
gcnii  citeseer           layers=32 hidden=256 dropout=.7 theta=.6 parts=40/20 clip
gcnii  pubmed             layers=16 hidden=256 dropout=.5 theta=.4 decay=5e-4/5e-4 parts=4/2
gcnii  coauthor_cs        layers=16 hidden=64 dropout=.5 parts=16/8
gcnii  coauthor_physics   layers=16 hidden=64 dropout=.5 parts=2/1 clip
gcnii  amazon_computers   layers=16 hidden=64 dropout=.2 parts=32/16 clip epochs=300
gcnii  amazon_photo       layers=16 hidden=64 dropout=.5 parts=4/2 clip
gcnii  wiki_cs            layers=4 hidden=128 dropout=.5 decay=5e-4/5e-4 parts=4/2
"""

# Full batch, then GAS, recalled from the paper's table 1 and not read again.
_PUBLISHED = """
dataset            gcn                       gat                       appnp                     gcnii
cora               81.88±.75/82.29±.76       82.80±.47/83.32±.62       83.28±.58/83.19±.58       85.04±.53/85.52±.39
citeseer           70.98±.66/71.18±.97       71.72±.91/71.86±1.00      72.13±.73/72.63±.82       73.06±.81/73.89±.48
pubmed             78.73±1.10/79.23±.62      78.03±.40/78.42±.56       80.21±.20/79.82±.52       79.72±.78/80.19±.49
coauthor_cs        91.08±.59/91.22±.45       90.31±.49/90.38±.42       92.51±.47/92.44±.58       92.45±.35/92.52±.31
coauthor_physics   93.10±.84/92.98±.72       92.32±.86/92.80±.61       93.40±.92/93.68±.61       93.43±.52/93.61±.41
amazon_computers   81.17±1.81/80.84±2.26     -                         81.79±2.00/81.66±1.81     83.04±1.81/83.05±1.16
amazon_photo       90.25±1.66/90.53±1.40     -                         91.27±1.26/91.23±1.34     91.42±.81/91.60±.78
wiki_cs            79.08±.50/79.00±.41       79.44±.41/79.56±.47       79.88±.40/79.75±.53       79.94±.67/80.02±.43
"""

_TYPES = {field.name: str(field.type) for field in fields(Setting)}
_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: text == "",
    "tuple[int, int]": lambda text: tuple(int(part) for part in text.split("/")),
    "tuple[float, float]": lambda text: tuple(float(part) for part in text.split("/")),
}


def _settings() -> dict[tuple[str, str], Setting]:
    shared: dict[str, dict[str, Any]] = {}
    found = {}
    for line in _SETTINGS.split("\n"):
        if not line:
            continue
        model, dataset, *words = line.split()
        pairs = (word.partition("=") for word in words)
        values = {name: _READ[_TYPES[name]](text) for name, _, text in pairs}
        if dataset == "*":
            shared[model] = values
        else:
            found[model, dataset] = Setting(model, dataset, **{**shared[model], **values})
    return found


def _published() -> dict[tuple[str, str], tuple[Accuracy, Accuracy]]:
    header, *lines = _PUBLISHED.strip().split("\n")
    models = header.split()[1:]
    found = {}
    for line in lines:
        dataset, *cells = line.split()
        for model, cell in zip(models, cells, strict=True):
            if cell != "-":
                full, gas = (Accuracy(*map(float, half.split("±"))) for half in cell.split("/"))
                found[model, dataset] = (full, gas)
    return found


SETTINGS = _settings()
PUBLISHED = _published()
MODELS = tuple(dict.fromkeys(model for model, _ in SETTINGS))
DATASETS = tuple(dict.fromkeys(dataset for _, dataset in SETTINGS))
