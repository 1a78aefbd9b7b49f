"""The configuration: TOML files and dotted overrides -> one strict, frozen schema -> `resolve`.

Imports no torch, so that `alf-moe --help` and every refusal of a bad configuration answer at once.

    text = load(["configs/tiny.toml"], ["--train.steps", "100"])    # raises ConfigError
    config = resolve(text, world_size=2)                            # every derived value filled in, every limit checked

A user error is a `ConfigError`: one sentence with the dotted path of the setting, its value, the limit and the way out.
"""

from moe.config.limits import check_rule, resolve, to_toml
from moe.config.loading import load, sentence, validate
from moe.config.schema import (
    ASSIGNMENTS,
    RATES,
    BalanceSection,
    CheckpointSection,
    Config,
    ConfigError,
    DataSection,
    DeepSpeedSection,
    EvaluateSection,
    ModelSection,
    ObserveSection,
    OptimSection,
    ParallelSection,
    RunSection,
    Section,
    TrainSection,
)

__all__ = [
    "ASSIGNMENTS",
    "RATES",
    "BalanceSection",
    "CheckpointSection",
    "Config",
    "ConfigError",
    "DataSection",
    "DeepSpeedSection",
    "EvaluateSection",
    "ModelSection",
    "ObserveSection",
    "OptimSection",
    "ParallelSection",
    "RunSection",
    "Section",
    "TrainSection",
    "check_rule",
    "load",
    "resolve",
    "sentence",
    "to_toml",
    "validate",
]
