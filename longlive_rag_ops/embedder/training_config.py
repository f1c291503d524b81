"""What the retrieval autoencoder is trained with, and the files that say so."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import check_int
from ..extras import need
from .autoencoder_config import LARGEST, AutoencoderConfig
from .latent_file import LatentFile
from .losses import FORMS

# Entries of LongLive-RAG's files that say where and how its script logs, which is not asked for here.
IGNORED = ("data_dir", "disable_wandb", "log_dir", "log_every", "tag", "gpu", "config", "resume")
IGNORED_PREFIX = "wandb_"
SIZES = ("in_channels", "spatial_h", "spatial_w")
# What a run may be resumed with another value of: none of them changes what a step computes.
CHANGEABLE = ("epochs", "patience", "num_workers", "save_every")


def _setting(default: Any, kind: type, meaning: str, low: float = 0, high: float | None = None, **more: Any) -> Any:
    """A field that `TrainingConfig` checks and of which the command line makes an option."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "low": low, "high": high, **more})


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters under the names of LongLive-RAG's training script, whose values are the defaults.

    Attributes:
        in_channels, spatial_h, spatial_w: sizes of a latent frame; None takes the data's.
        latent_dim: size of an embedding.
        hidden_dims: channels of the stages; each halves height and width.
        seq_len: consecutive frames in a chunk.
        chunks_per_clip: chunks drawn from a clip in each epoch.
        batch_size: chunks in a batch; the last batch of an epoch may have fewer.
        lr, weight_decay: of AdamW.
        epochs: passes over the training clips.
        val_split: part of the clips that is kept for validation, at least one.
        data_percentage: part of the clips that is used (of 1, whatever its name says), the first by name.
        delta_margin, delta_weight, delta_window: of the Window Temporal Delta Loss.
        smooth_weight, smooth_form: of the trajectory's smoothness.
        grad_clip: largest norm of the gradient; 0 leaves it as it is.
        use_amp: compute in float16 on CUDA. On a CPU float32 is used whatever this says.
        num_workers: processes that read clips; 0 reads in the training process. Numbers do not depend on it.
        seed: of the initial weights, the split, the order and the chunks.
        save_every: epochs between exports of the model that are kept; 0 keeps none but the best.
        patience: epochs without a smaller validation loss after which training ends; 0 never ends it.

    Raises:
        TypeError, ValueError: a value has another type or is out of range; the message names it.
    """

    in_channels: int | None = _setting(None, int, "channels of a latent frame (default: the data's)", 1, LARGEST)
    spatial_h: int | None = _setting(None, int, "height of a latent frame (default: the data's)", 1, LARGEST)
    spatial_w: int | None = _setting(None, int, "width of a latent frame (default: the data's)", 1, LARGEST)
    latent_dim: int = _setting(1024, int, "size of an embedding", 1, LARGEST)
    hidden_dims: tuple[int, ...] = _setting((64, 128, 256), tuple, "channels of the stages", 1, LARGEST)
    seq_len: int = _setting(8, int, "consecutive frames in a chunk", 1)
    chunks_per_clip: int = _setting(1, int, "chunks drawn from a clip in each epoch", 1)
    batch_size: int = _setting(128, int, "chunks in a batch", 1)
    lr: float = _setting(3e-4, float, "learning rate of AdamW", above=True)
    weight_decay: float = _setting(1e-4, float, "weight decay of AdamW")
    epochs: int = _setting(400, int, "passes over the training clips", 1)
    val_split: float = _setting(0.1, float, "part of the clips kept for validation", 0, 1, above=True, below=True)
    data_percentage: float = _setting(1.0, float, "part of the clips used, at most 1", 0, 1, above=True)
    delta_margin: float = _setting(0.85, float, "cosine of neighbours up to which nothing is lost", -1, 1)
    delta_weight: float = _setting(1.0, float, "weight of the Window Temporal Delta Loss")
    delta_window: int = _setting(3, int, "largest distance of its neighbours in frames", 1)
    smooth_weight: float = _setting(1.0, float, "weight of the smoothness of the trajectory")
    smooth_form: str = _setting("norm", str, "its form: the released code's, or the paper's", choices=FORMS)
    grad_clip: float = _setting(1.0, float, "largest norm of the gradient, 0: any")
    use_amp: bool = _setting(True, bool, "compute in float16 on CUDA")
    num_workers: int = _setting(0, int, "processes that read clips, 0: none of their own", 0)
    seed: int = _setting(42, int, "of weights, split, order and chunks", 0, 2**63 - 1)
    save_every: int = _setting(50, int, "epochs between exports that are kept, 0: the best one alone")
    patience: int = _setting(0, int, "epochs without a better validation loss before the end, 0: never")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                object.__setattr__(self, setting.name, _checked(setting.name, value, setting.metadata))

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """Sizes of the model; the frame's must be known.

        Raises:
            ValueError: they are not.
        """
        unknown = [name for name in SIZES if getattr(self, name) is None]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} must be given or taken from data, see fitted")
        return AutoencoderConfig.from_mapping(asdict(self))

    def fitted(self, clip: LatentFile) -> TrainingConfig:
        """The same with the sizes of a clip's frames where it has none.

        Raises:
            ValueError: it has others; the message names the clip's file.
        """
        for name, size in zip(SIZES, clip.frame_shape, strict=True):
            if getattr(self, name) not in (None, size):
                asked = tuple(getattr(self, name) for name in SIZES)
                raise ValueError(
                    f"{', '.join(SIZES)} must be those of the data: {clip.path} has {clip.frame_shape}, the "
                    f"configuration says {asked}"
                )
        sizes: dict[str, Any] = dict(zip(SIZES, clip.frame_shape, strict=True))
        return replace(self, **sizes)

    def to_mapping(self) -> dict[str, Any]:
        """All settings, of JSON's types."""
        return asdict(self) | {"hidden_dims": list(self.hidden_dims)}

    def differences(self, other: TrainingConfig) -> list[str]:
        """What differs from another configuration in what a step computes, a line for each setting."""
        return [
            f"{name} is {getattr(other, name)!r}, was {getattr(self, name)!r}"
            for name in (setting.name for setting in fields(self))
            if name not in CHANGEABLE and getattr(self, name) != getattr(other, name)
        ]


def settings_from(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """What of a mapping are settings, and the names of what is LongLive-RAG's and ignored here.

    Numbers that are texts become floats: YAML 1.1 takes ``3e-4`` for a text.

    Args:
        values: settings by name; None stands for the default.
        source: of the values, for errors.

    Raises:
        ValueError: a name is neither, a text is no number, or a value is not allowed.
    """
    known = {setting.name: setting for setting in fields(TrainingConfig)}
    settings: dict[str, Any] = {}
    ignored = []
    for name, value in values.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} has a setting whose name is no text but {type(name).__name__}")
        if name in known:
            text = known[name].metadata["kind"] is float and isinstance(value, str)
            if value is not None:
                settings[name] = _number(name, value, source) if text else value
        elif name in IGNORED or name.startswith(IGNORED_PREFIX):
            ignored.append(name)
        else:
            close = difflib.get_close_matches(name, known)
            allowed = f"is it {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{source} has the unknown setting {name!r}; {allowed}")
    try:
        TrainingConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    return settings, ignored


def read_settings(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Settings of a ``.json`` or ``.yaml`` file, and the names of those ignored, see `settings_from`.

    An empty YAML file has none.

    Raises:
        ValueError: another ending, no mapping, or what `settings_from` refuses. RuntimeError: YAML without PyYAML.
    """
    path = Path(path)
    source = f"configuration {path}"
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{source} must end in .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} must be UTF-8 text: {error}") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
    else:
        yaml = need("yaml", f"reading {path.name}", extra="train")
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{source} is not YAML: {error}") from None
        # PyYAML hands values to Python as they are: a 13th month, more digits than Python reads, an empty int.
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{source} has a value that YAML cannot read: {error}") from None
        values = {} if values is None else values  # an empty file, which LongLive-RAG takes for the defaults
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must be a mapping of settings, got {type(values).__name__}")
    return settings_from(values, source)


def _number(name: str, text: str, source: str) -> float:
    try:
        if "_" in text:  # which float() leaves out
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{source}: {name} must be a number, got {text!r}") from None


def _checked(name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    kind, low, high = rule["kind"], rule["low"], rule["high"]
    if kind is int:
        return check_int(name, value, low, high)
    if kind is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise TypeError(f"{name} must be a sequence of at least one size, got {value!r}")
        return tuple(check_int(name, size, low, high) for size in value)
    if kind is float:
        return _checked_float(name, value, rule)
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__} ({value!r})")
    if "choices" in rule and value not in rule["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(rule['choices'])}; got {value!r}")
    return value


def _checked_float(name: str, value: Any, rule: Mapping[str, Any]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} ({value!r})")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    low, high = rule["low"], math.inf if rule["high"] is None else rule["high"]
    above, below = rule.get("above", False), rule.get("below", False)
    if not low <= value <= high or math.isinf(value) or (above and value == low) or (below and value == high):
        allowed = f"{'above' if above else 'at least'} {low}"
        if rule["high"] is not None:
            allowed += f" and {'below' if below else 'at most'} {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value
