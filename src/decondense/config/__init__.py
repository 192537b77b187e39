"""Every knob of the project: one frozen, validated class per concern, and the only home of each default.

Public functions read their keyword defaults from these classes; the command line and the study files are parsed into
them. A configuration is data: it is unchanged by a round trip through YAML, and :meth:`Config.fingerprint` names it.
No torch here: the evidence side reads configurations too.
"""

from decondense.config.attach import DispersionConfig, WeightSchedule
from decondense.config.base import Config, ConfigError, one_of, parse_yaml, suggest
from decondense.config.loss import COMPAT_NAMES, FORM_NAMES, CallOptions, LossConfig, LossOptions
from decondense.config.measure import METRIC_NAMES, MeasureConfig
from decondense.config.model import PREPARED, ArmModelConfig, LoraConfig, ModelConfig, Overrides
from decondense.config.study import (
    ARM_SETTINGS,
    SETTINGS,
    ArmConfig,
    ArmIdentity,
    PreparedConfig,
    StudyConfig,
    SweepConfig,
)
from decondense.config.train import CorpusConfig, EvaluateConfig, TrainConfig
from decondense.config.treatments import (
    TREATMENTS,
    ActiveForgettingConfig,
    DistillationConfig,
    GradientNoiseConfig,
    NoisyEmbeddingConfig,
    Treatment,
    Treatments,
)

__all__ = [
    "ARM_SETTINGS",
    "COMPAT_NAMES",
    "FORM_NAMES",
    "METRIC_NAMES",
    "PREPARED",
    "SETTINGS",
    "TREATMENTS",
    "ActiveForgettingConfig",
    "ArmConfig",
    "ArmIdentity",
    "ArmModelConfig",
    "CallOptions",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "DispersionConfig",
    "DistillationConfig",
    "EvaluateConfig",
    "GradientNoiseConfig",
    "LoraConfig",
    "LossConfig",
    "LossOptions",
    "MeasureConfig",
    "ModelConfig",
    "NoisyEmbeddingConfig",
    "Overrides",
    "PreparedConfig",
    "StudyConfig",
    "SweepConfig",
    "TrainConfig",
    "Treatment",
    "Treatments",
    "WeightSchedule",
    "one_of",
    "parse_yaml",
    "suggest",
]
