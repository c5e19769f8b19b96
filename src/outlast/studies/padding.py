"""Study ``padding``: does padding that is used on one side only make a trained detector blind on the other?

Alsallakh, Kokhlikyan, Miglani, Yuan, Reblitz-Richardson, "Mind the Pad - CNNs Can Develop Blind Spots", ICLR 2021: the traffic lights
that SSD misses, shrunk to a detector that two cores train. The paper's data, models and accuracies are not at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

_HEIGHT, _WIDTH = 9, 5  # of a traffic light, in pixels
_CELL = 8  # pixels between cells of the heat maps
_BANDS = ("top", "bottom", "left", "right")


class Lights(Settings):
    """A detector of small traffic lights on pictures of other things."""

    dataset: Literal["cifar10", "fashion-mnist"] = "cifar10"
    variant: Literal["full", "small"] = "full"
    size: int = Field(default=64, ge=32)
    mode: Literal["zeros", "symmetric"] = "zeros"
    margin: int = Field(default=12, ge=0)
    widths: tuple[int, ...] = (12, 24, 24, 32, 32, 48, 48)
    positive_weight: float = Field(default=21.0, gt=0)
    train_size: int = Field(default=2400, ge=2)
    epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=48, ge=1)
    lr: float = Field(default=6e-3, gt=0)
    backgrounds: int = Field(default=12, ge=1)
    stride: int = Field(default=3, ge=1)


def cell(config: Lights, seed: int, context: Context) -> Outcome:
    """Train a detector, set its threshold on distractors, and probe it everywhere."""
    import torch
    from torch.nn import functional as F

    from outlast.data import load
    from outlast.diagnose import padding

    train, test = (load(config.dataset, split, variant=config.variant) for split in ("train", "test"))
    chosen = torch.randperm(len(train), generator=context.generator("subset"))[: config.train_size]
    if len(chosen) < config.train_size:
        raise ValueError(f"train_size is {config.train_size}, but {config.dataset} ({config.variant}) has {len(train)} training images")
    weight = torch.tensor(config.positive_weight)
    scenes = _Scenes(config, context.generator("scenes"))
    model: Any = context.plain(
        context.train(
            context.initialise(lambda: detector(train.images.shape[1], config.widths, config.mode)),
            lambda module: torch.optim.AdamW(module.parameters(), lr=config.lr),
            train.images[chosen],
            train.labels[chosen],
            loss_fn=lambda maps, target: F.binary_cross_entropy_with_logits(maps, target, pos_weight=weight.to(maps.device)),
            epochs=config.epochs,
            batch_size=config.batch_size,
            mix=scenes.batch,
            schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps),
        )
    )
    lights = [light(lamp).expand(train.images.shape[1], -1, -1) for lamp in range(3)]
    stream = context.generator("test")
    some = torch.randperm(len(test), generator=stream)
    pictures = test.images[some[: config.backgrounds]]
    backgrounds = background(pictures, config.size, stream)
    threshold = _threshold(model, config, test.images[some[config.backgrounds :][:1000]], lights[1], context.generator("distractors"))
    found: list[Tensor] = []
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    for channel, lamp in enumerate((0, 2)):
        near = padding.heat_map(channel, _CELL, 1.0)
        probed = padding.probe(
            model,
            lights[lamp],
            backgrounds,
            lambda output, places, near=near: (near(output, places) > threshold).double(),
            stride=config.stride,
            batch_size=240,
        )
        found.append(probed.scores)
        rows, columns = probed.rows, probed.columns
    recall = 100.0 * torch.stack(found).mean(0)
    high, wide = (recall.shape[0] // 4, recall.shape[1] // 4)
    report = padding.audit(model, (train.images.shape[1], config.size, config.size))
    bands = (recall[:2], recall[-2:], recall[:, :2], recall[:, -2:])
    return Outcome(
        {
            "centre": float(recall[high:-high, wide:-wide].mean()),
            **{name: float(band.mean()) for name, band in zip(_BANDS, bands, strict=True)},
            "worst": float(recall.min()),
            "skew": report.grid_skew_px[0],
        },
        {"recall": recall.flatten().tolist(), "rows": [float(y) for y in rows], "columns": [float(x) for x in columns]},
    )


def light(lamp: int) -> Tensor:
    """A traffic light, ``(1, 9, 5)``: a dark body with three lamps of 3x3 pixels, of which one is lit (0 is the top one)."""
    import torch

    image = torch.full((1, _HEIGHT, _WIDTH), 0.05)
    for each in range(3):
        image[:, 3 * each : 3 * each + 3, 1:4] = 1.0 if each == lamp else 0.3
    return image


def background(pictures: Tensor, size: int, stream: torch.Generator) -> Tensor:
    """Pictures (uint8) enlarged and dimmed, with noise: ``(n, channels, size, size)`` around 0.2 to 0.8."""
    import torch
    from torch.nn import functional as F

    large = F.interpolate(pictures.float() / 255.0, size=(size, size), mode="bilinear", align_corners=False)
    noise = torch.randn(large.shape, generator=stream).to(large.device)
    return 0.6 * large + 0.1 * noise + 0.2


def detector(channels: int, widths: tuple[int, ...], mode: str) -> nn.Module:
    """Convolutions of 3x3 with strides 1, 2, 1, 2, ..., normalised and cut at 0; two heat maps at stride 8."""
    from torch import nn

    from outlast.diagnose.padding import Conv2d
    from outlast.studies._models import channels_last

    layers: list[nn.Module] = []
    before = channels
    for number, width in enumerate(widths):
        layers += [Conv2d(before, width, 3, 1 + number % 2, 1, bias=False, padding_mode=mode), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return channels_last(nn.Sequential(*layers, nn.Conv2d(before, 2, 1)))


class _Scenes:
    """Pastes a traffic light into each background and says where, as the training loop's ``mix``."""

    def __init__(self, config: Lights, stream: torch.Generator) -> None:
        import torch

        self._config = config
        self._stream = stream
        self._lights = torch.stack([light(lamp) for lamp in range(3)])

    def batch(self, pictures: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """Scenes and their heat maps: 1 at the cell next to a light of the class, nothing for distractors."""
        import torch

        config, n = self._config, len(pictures)
        scenes = background(pictures, config.size, self._stream)
        lamps = torch.randint(3, (n,), generator=self._stream)
        tops, lefts = (
            config.margin + torch.randint(config.size - extent - 2 * config.margin + 1, (n,), generator=self._stream)
            for extent in (_HEIGHT, _WIDTH)
        )
        paste(scenes, self._lights[lamps].to(scenes.device), tops, lefts)
        cells = -(-config.size // _CELL)
        target = torch.zeros(n, 2, cells, cells)
        y, x = (
            ((start + (extent - 1) / 2) / _CELL).round().long().clamp_max(cells - 1) for start, extent in ((tops, _HEIGHT), (lefts, _WIDTH))
        )
        lit = lamps != 1
        target[torch.arange(n)[lit], (lamps[lit] == 2).long(), y[lit], x[lit]] = 1.0
        return scenes, target.to(scenes.device)


def paste(scenes: Tensor, stimuli: Tensor, tops: Tensor, lefts: Tensor) -> None:
    """Put one stimulus into each scene, in place."""
    h, w = stimuli.shape[2:]
    for scene, stimulus, top, left in zip(scenes, stimuli, tops.tolist(), lefts.tolist(), strict=True):
        scene[:, top : top + h, left : left + w] = stimulus


def _threshold(model: nn.Module, config: Lights, pictures: Tensor, distractor: Tensor, stream: torch.Generator) -> float:
    """The score that 5 % of scenes with a distractor reach, distractors lying where they lay in training."""
    import torch

    scenes = background(pictures, config.size, stream)
    tops, lefts = (
        config.margin + torch.randint(config.size - extent - 2 * config.margin + 1, (len(scenes),), generator=stream)
        for extent in (_HEIGHT, _WIDTH)
    )
    paste(scenes, distractor.expand(len(scenes), -1, -1, -1), tops, lefts)
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        best = torch.cat([model(part.to(device)).flatten(1).amax(1) for part in scenes.split(250)])
    return float(best.double().quantile(0.95))


def _least(results: Results, arm: str, metrics: tuple[str, ...], seed: int, setting: str) -> float:
    return min(results.value(arm, metric, seed, setting) for metric in metrics)


def _weakest_centre(results: Results, seed: int) -> float:
    """The worst centre of all detectors of a seed."""
    results.need_all()
    return min(
        results.value(arm, "centre", seed, setting) for setting in results.settings for arm in results.arms if results.has(arm, setting)
    )


def _band(arm: str, band: str) -> Callable[[Results, int], float]:
    return lambda results, seed: results.value(arm, band, seed, "interior")


def _draw_maps(figure: Any, results: Results) -> None:
    import numpy as np

    shown = [(arm, setting) for setting in results.settings for arm in results.arms if results.has(arm, setting)]
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    picture: Any = None
    for ax, (arm, setting) in zip(axes, shown, strict=True):
        seed = results.seeds[0]
        rows, columns = (results.series(arm, name, seed, setting) for name in ("rows", "columns"))
        recall = np.reshape(results.series(arm, "recall", seed, setting), (len(rows), len(columns)))
        edges = [np.concatenate([places[:1], np.add(places[1:], places[:-1]) / 2, places[-1:]]) for places in (columns, rows)]
        picture = ax.pcolormesh(*edges, recall, vmin=0, vmax=100, cmap="viridis")
        ax.invert_yaxis()
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"{arm.replace('-', ', ')}\n{'lights anywhere' if setting == 'anywhere' else 'lights inside'}", fontsize="small")
    figure.colorbar(picture, ax=list(axes), label="recall, %", shrink=0.8)


def _describe_maps(results: Results) -> str:
    parts: list[str] = []
    for setting in results.settings:
        for arm in results.arms:
            if results.has(arm, setting):
                seed = results.seeds[0]
                values = ", ".join(f"{name} {results.value(arm, name, seed, setting):.0f}" for name in ("centre", *_BANDS))
                parts.append(f"{arm}, trained with lights {'anywhere' if setting == 'anywhere' else 'inside'}: {values}")
    return f"Recall by place of the light, seed {results.seeds[0]}, in per cent. " + "; ".join(parts) + "."


_SKEWED, _CLEAN = "64-zeros", "65-symmetric"
_EVERYWHERE = Setting("anywhere", "lights anywhere in training", {"margin": 0}, arms=(_SKEWED, _CLEAN))

_BLIND_SPOTS = Part(
    name="blind-spots",
    question="Is a detector blind where its padding is not used, and what cures it?",
    settings_type=Lights,
    cell=cell,
    version=2,
    arms=(
        Arm(_SKEWED, "64 pixels, zeros", "baseline"),
        Arm("64-symmetric", "64 pixels, symmetric padding", "ablation", {"mode": "symmetric"}),
        Arm("65-zeros", "65 pixels, zeros", "ablation", {"size": 65}),
        Arm(_CLEAN, "65 pixels, symmetric padding", "method", {"size": 65, "mode": "symmetric"}),
    ),
    metrics=(
        Metric("centre", "Recall in the centre", "%", "higher"),
        *(Metric(name, f"{name.capitalize()} edge", "%", "higher") for name in _BANDS),
        Metric("worst", "Worst place", "%", "higher"),
        Metric("skew", "Lean of the grid", "px", None),
    ),
    claims=(
        Claim(
            "blind-right",
            "At 64 pixels with zero padding a detector trained on lights inside the picture finds at most 65 % at the right edge",
            _band(_SKEWED, "right"),
            65.0,
            "at most",
            "%",
        ),
        Claim(
            "blind-bottom",
            "At 64 pixels with zero padding that detector finds at most 65 % at the bottom edge",
            _band(_SKEWED, "bottom"),
            65.0,
            "at most",
            "%",
        ),
        Claim(
            "cured",
            "At 65 pixels, where no layer leans, with symmetric padding, such a detector finds at least 85 % at the right edge",
            _band(_CLEAN, "right"),
            85.0,
            unit="%",
        ),
        Claim(
            "difference",
            "Clean size and symmetric padding find at least 20 points more lights at the right edge than 64 pixels with zeros",
            lambda results, seed: results.value(_CLEAN, "right", seed, "interior") - results.value(_SKEWED, "right", seed, "interior"),
            20.0,
            unit="points",
        ),
        Claim("centre", "Every detector finds at least 97 % in the centre", _weakest_centre, 97.0, unit="%"),
        Claim(
            "covered",
            "Trained on lights up to the border, the detector of 64 pixels with zeros finds at least 95 % at every edge: no blind spot",
            lambda results, seed: _least(results, _SKEWED, _BANDS, seed, "anywhere"),
            95.0,
            unit="%",
        ),
    ),
    figures=(Figure("maps", "Where the trained detectors see a light", _describe_maps, _draw_maps),),
    scales={
        "quick": Scale(
            arms=(_SKEWED, _CLEAN),
            settings=(
                Setting("interior", "lights 12 pixels or more inside in training"),
                Setting("anywhere", "lights anywhere in training", {"margin": 0}, arms=(_SKEWED,)),
            ),
            changes={
                "dataset": "fashion-mnist",
                "variant": "small",
                "widths": (8, 8, 8, 16, 16, 24, 24),
                "epochs": 8,
                "backgrounds": 4,
            },
            data=(("fashion-mnist", "small"),),
            dropped="colour photographs, a third to two thirds of the channels, 8 of 12 test backgrounds, the arms with one cure only",
            minutes=2,
        ),
        "standard": Scale(
            arms=(_SKEWED, "64-symmetric", "65-zeros", _CLEAN),
            settings=(Setting("interior", "lights 12 pixels or more inside in training"), _EVERYWHERE),
            data=(("cifar10", "full"),),
            minutes=20,
            seeds=5,
        ),
    },
    deviations=(
        "The paper's detectors, traffic data and ImageNet accuracies are replaced by a small detector of pasted lights.",
        "Lights lie at least 12 pixels inside in training, as in pictures taken from cars; a second setting takes that away.",
    ),
)

STUDY = Study(
    name="padding",
    title="Padding and blind spots",
    question="Does padding that is used on one side only make a trained detector blind on the other?",
    paper="Alsallakh, Kokhlikyan, Miglani, Yuan, Reblitz-Richardson: Mind the Pad - CNNs Can Develop Blind Spots. ICLR 2021",
    follows="The missed traffic lights of its section on detection, with a detector of our own",
    theme="know your network and your data",
    parts=(_BLIND_SPOTS,),
    origin="outlast.studies.padding:STUDY",
)
