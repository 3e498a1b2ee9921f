"""The recipe: YAML and dotted overrides in, `Recipe` out; workers see only the resolved JSON. One file a section."""

from hone.recipe.data import AudioAugmentation, AugmentSettings, DataSettings, ImageAugmentation, MixedSource, TextAugmentation
from hone.recipe.guard import GuardSettings, HealthSettings
from hone.recipe.load import load_recipe, parse_override, parse_recipe, recipe_schema, with_overrides
from hone.recipe.method import (
    AdapterMethod,
    FreezeMethod,
    FullMethod,
    GradualUnfreezing,
    Ia3Method,
    LoraMethod,
    Method,
    PrefixMethod,
    PromptMethod,
)
from hone.recipe.publish import Bounds, GateSettings, PublishSettings
from hone.recipe.recipe import Recipe, allowed_stages
from hone.recipe.search import AshaScheduler, Choice, Distribution, GridSearch, LogUniform, RandInt, SearchSettings, Uniform
from hone.recipe.serving import EngineName, ServingSettings, VllmSettings
from hone.recipe.train import (
    CheckpointSettings,
    OptimSettings,
    PreferenceSettings,
    ScalingSettings,
    TrackSettings,
    TrainSettings,
    ZeroSettings,
)

__all__ = [
    "AdapterMethod",
    "AshaScheduler",
    "AudioAugmentation",
    "AugmentSettings",
    "Bounds",
    "CheckpointSettings",
    "Choice",
    "DataSettings",
    "Distribution",
    "EngineName",
    "FreezeMethod",
    "FullMethod",
    "GateSettings",
    "GradualUnfreezing",
    "GridSearch",
    "GuardSettings",
    "HealthSettings",
    "Ia3Method",
    "ImageAugmentation",
    "LogUniform",
    "LoraMethod",
    "Method",
    "MixedSource",
    "OptimSettings",
    "PreferenceSettings",
    "PrefixMethod",
    "PromptMethod",
    "PublishSettings",
    "RandInt",
    "Recipe",
    "ScalingSettings",
    "SearchSettings",
    "ServingSettings",
    "TextAugmentation",
    "TrackSettings",
    "TrainSettings",
    "Uniform",
    "VllmSettings",
    "ZeroSettings",
    "allowed_stages",
    "load_recipe",
    "parse_override",
    "parse_recipe",
    "recipe_schema",
    "with_overrides",
]
