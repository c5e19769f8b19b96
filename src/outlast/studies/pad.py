"""Study ``pad``: does a policy that goes on learning after deployment earn more, and what does it cost where nothing has changed?

Hansen et al., "Self-Supervised Policy Adaptation during Deployment", ICLR 2021: its protocol of paired episodes under changed colours,
distractors and textures, on a small scene that two cores can train on. The paper's environments need a GPU and are not run here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.adapt import PolicyAdapter
    from outlast.studies._context import Context
    from outlast.studies._results import Results

_STRIP = 8  # frames in the film strip
_WARMUP = 2  # steps until the stack of three frames is filled


class Deployment(Settings):
    """A policy trained in one look of a scene and deployed in another."""

    method: Literal["frozen", "paper", "default", "buffer", "gate", "encoder", "first", "ungated", "whole"] = "default"
    training: Literal["plain", "alone", "jitter", "convolution"] = "plain"
    share: Literal["convolutions", "features"] = "convolutions"
    learner: Literal["sac", "imitation"] = "sac"
    shift: Literal["train", "color_easy", "color_hard", "distract", "texture"] = "color_hard"
    train_steps: int = Field(default=5000, ge=1)
    episodes: int = Field(default=100, ge=3)
    steps: int = Field(default=100, ge=2)
    batch: int = Field(default=16, ge=1)


def cell(config: Deployment, seed: int, context: Context) -> Outcome:
    """Train (once for all cells of a seed), then run each episode frozen and adapted, on the same colours, start and target.

    Thirds of the episodes are by the frozen policy's reward in the same look from another start: sorted by the very rewards that
    the gain is measured against, a change without effect would look like a gain where they were low.
    """
    import numpy as np

    from outlast.rl import PixelReach

    key = ("pad policy", config.training, config.share, config.learner, config.train_steps)
    parts = context.shared(key, lambda: _trained(config, seed, context))
    place = (*key, config.shift, config.steps, config.episodes)
    before = context.shared(place, lambda: _episodes(_frozen(parts), config, seed, learns=False))
    looks = context.shared((*place, "looks"), lambda: _episodes(_frozen(parts), config, seed, learns=False, elsewhere=True))
    adapted = _frozen(parts) if config.method == "frozen" else _adapter(config, parts, seed)
    if config.method in ("gate", "first", "whole"):
        adapted.calibrate(PixelReach(steps=config.steps), 5, seed=_episode_seed(seed, -100))
    played = before if config.method == "frozen" else _episodes(adapted, config, seed, learns=True, report=context.report)
    rewards, kept, ranked = (np.array([each.reward for each in run]) for run in (played, before, looks))
    gap = rewards - kept
    thirds = np.array_split(np.argsort(ranked, kind="stable"), 3)
    return Outcome(
        {
            "reward": float(rewards.mean()),
            "frozen": float(kept.mean()),
            "gain": float(gap.mean()),
            "error": float(gap.std(ddof=1) / len(gap) ** 0.5),
            **{name: float(gap[third].mean()) for name, third in zip(("worst", "middle", "best"), thirds, strict=True)},
            "updates": 100.0 * sum(each.updates for each in played) / (config.episodes * config.steps),
            "loss_begin": float(np.mean([each.losses[0] for each in played])),
            "loss_end": float(np.mean([each.losses[1] for each in played])),
            "departure": sum(each.departure for each in played) / config.episodes,
        },
        {"frozen actions": before[0].actions, "adapted actions": played[0].actions, "gains": gap.tolist(), "rewards": kept.tolist()},
    )


def _episode_seed(seed: int, episode: int) -> int:
    """Seeds of the test: far from those of training."""
    return 1_000_000 + 10_000 * seed + episode


class _Played:
    """One episode."""

    def __init__(self, reward: float, actions: list[float], updates: float, departure: float, losses: tuple[float, float]) -> None:
        self.reward, self.actions, self.updates, self.departure, self.losses = reward, actions, updates, departure, losses


def _episodes(
    agent: PolicyAdapter,
    config: Deployment,
    seed: int,
    *,
    learns: bool,
    elsewhere: bool = False,
    report: Callable[[int, int, float], None] | None = None,
) -> list[_Played]:
    """The test's episodes, the same for every method; ``elsewhere`` keeps their looks and moves start and target."""
    from outlast._core._random import derived_seed
    from outlast.rl import PixelReach

    env, played = PixelReach(shift=config.shift, steps=config.steps), []
    for episode in range(config.episodes):
        options = {"places": derived_seed(seed, "other places", episode)} if elsewhere else None
        played.append(_play(agent, env, _episode_seed(seed, episode), options, learns=learns))
        if report is not None:
            report(episode + 1, config.episodes, played[-1].reward)
    return played


def _play(agent: PolicyAdapter, env: Any, seed: int, options: dict[str, Any] | None, *, learns: bool) -> _Played:
    """Mean reward a step, the actions, what the adapter did, and the task's loss at all steps after the warm-up, learnt from or not."""
    agent.reset()
    agent.begin_episode()
    obs, _ = env.reset(seed=seed, options=options)
    total, steps, over = 0.0, 0, False
    actions: list[float] = []
    losses: list[float] = []
    while not over:
        action = agent.act(obs)
        following, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
        if steps >= _WARMUP:
            losses.append(agent.loss(obs, action, following))
        if learns:
            agent.observe(obs, action, following, terminated=terminated, truncated=truncated)
        total, steps, over, obs = total + reward, steps + 1, terminated or truncated, following
        actions += [float(value) for value in action]
    report = agent.report
    tenth = max(1, len(losses) // 10)
    ends = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return _Played(total / steps, actions, float(report.updates), report.departure if learns else 0.0, ends)


def _frozen(parts: tuple[Any, Any, Any]) -> PolicyAdapter:
    from outlast.adapt import PolicyAdapter, RandomCrop

    return PolicyAdapter(*parts, lr=0.0, augment=RandomCrop(24))


def _adapter(config: Deployment, parts: tuple[Any, Any, Any], seed: int) -> PolicyAdapter:
    from outlast._core._random import generator
    from outlast.adapt import PolicyAdapter, RandomCrop

    shared: dict[str, Any] = {
        "augment": RandomCrop(24),
        "batch": config.batch,
        "warmup": _WARMUP,
        "generator": generator(seed, "adaptation"),
    }
    if config.method == "paper":
        return PolicyAdapter.paper(*parts, **shared)
    first: dict[str, Any] = {"lr": 1e-3, "buffer": 64, "newest": 4, "update_aux": False}
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "buffer": {"lr": 3e-4, "buffer": 64, "newest": 4},
        "gate": {"lr": 3e-4, "buffer": 64, "newest": 4, "gate": "auto"},
        "encoder": {"update_aux": False},
        # New colours are undone by the first layer; everything behind it, the head included, says what it should give.
        "first": {**first, "gate": "auto", "params": _of_first_layer},
        "ungated": {**first, "params": _of_first_layer},
        "whole": {**first, "gate": "auto"},
    }
    return PolicyAdapter(*parts, **settings[config.method], **shared)


def _of_first_layer(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("layers.0.")


# ---- training -------------------------------------------------------------------------------------------------------------------


def _trained(config: Deployment, seed: int, context: Context) -> tuple[nn.Module, nn.Module, Any]:
    """Encoder, policy and task of a policy trained in the usual scene, with or without the task and changed images."""
    from outlast.rl import PixelReach, PixelSAC, SACSettings

    augment = {"jitter": _jittered, "convolution": _convolved}.get(config.training)
    settings = SACSettings(share=config.share, aux_every=None if config.training == "alone" else 2)
    trainer = PixelSAC(PixelReach(), seed=seed, augment=augment, settings=settings)
    if config.learner == "sac":
        trainer.learn(config.train_steps)
    else:
        _imitate(trainer, config.train_steps, augment, context, alone=config.training == "alone")
    return trainer.encoder, trainer.policy, trainer.aux


def _imitate(trainer: Any, batches: int, augment: Any, context: Context, *, alone: bool) -> None:
    """Train the same networks on the expert's actions and the auxiliary task, from 4,000 steps of random and of noisy expert actions."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from outlast._core._random import derived_seed
    from outlast.adapt import RandomCrop
    from outlast.rl import PixelReach
    from outlast.rl._stack import FrameReplay

    env, draws = PixelReach(), context.generator("imitation")
    replay = FrameReplay(8192, (3, 28, 28), (4,))  # the action that was executed, and the expert's
    episode = 0
    while len(replay) < 4000:
        obs, _ = env.reset(seed=derived_seed(trainer.seed, "imitated episode", episode) % 2**31)
        replay.begin(obs[-3:])
        over = False
        while not over:
            expert = env.expert()
            noise = torch.rand(2, generator=draws).numpy() * 2.0 - 1.0
            executed = noise if episode % 2 else np.clip(expert + 0.5 * noise, -1.0, 1.0)
            obs, _, _, over, _ = env.step(executed.astype(np.float32))
            replay.add(np.concatenate([executed, expert]).astype(np.float32), 0.0, obs[-3:], terminated=False)
        episode += 1
    crop = RandomCrop(24)
    optimizer = torch.optim.Adam([*trainer.encoder.parameters(), *trainer.policy.parameters(), *trainer.aux.parameters()], lr=1e-3)
    for _ in range(batches):
        before, both, _, after, _ = replay.sample(64, draws)
        both_images = torch.cat([crop(each, draws) / 255.0 for each in (before, after)], 1)
        images = (both_images if augment is None else augment(both_images, draws)).chunk(2, 1)
        loss = F.mse_loss(trainer.policy(trainer.encoder(images[0])), both[:, 2:])
        if not alone:
            loss = loss + trainer.aux.loss(trainer.encoder, images[0], both[:, :2], images[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _jittered(images: Tensor, stream: torch.Generator) -> Tensor:
    """Each image's colours scaled by 0.6 to 1.4 and moved by up to 0.2, by channel, alike in all frames of its stack."""
    import torch

    n, frames = len(images), images.shape[1] // 3
    scale, offset = (low + width * torch.rand(n, 1, 3, 1, 1, generator=stream) for low, width in ((0.6, 0.8), (-0.2, 0.4)))
    moved = images.unflatten(1, (frames, 3)) * scale.to(images.device) + offset.to(images.device)
    return moved.clamp(0.0, 1.0).flatten(1, 2)


def _convolved(images: Tensor, stream: torch.Generator) -> Tensor:
    """A random 3x3 convolution over the colours of half of the images, one for the batch, followed by a sigmoid."""
    import torch
    from torch.nn import functional as F

    n, frames = len(images), images.shape[1] // 3
    weight = torch.randn(3, 3, 3, 3, generator=stream).to(images.device) / 27.0**0.5
    flat = images.unflatten(1, (frames, 3)).flatten(0, 1)
    found = torch.sigmoid(2.0 * F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), weight)).unflatten(0, (n, frames)).flatten(1, 2)
    chosen = (torch.rand(n, 1, 1, 1, generator=stream) < 0.5).to(images.device)
    return torch.where(chosen, found, images)


# ---- figures --------------------------------------------------------------------------------------------------------------------

_STILL = ("frozen", "alone", "jitter", "convolution")  # arms that do not adapt


def _draw_strip(figure: Any, results: Results) -> None:
    import numpy as np

    from outlast.rl import PixelReach

    setting, seed = _strip_of(results), results.seeds[0]
    axes = figure.subplots(2, _STRIP)
    for row, name in zip(axes, ("frozen", "adapted"), strict=True):
        actions = np.reshape(results.series("default", f"{name} actions", seed, setting), (-1, 2))
        env = PixelReach(shift=setting.replace("-", "_"), steps=len(actions), render_mode="rgb_array")
        env.reset(seed=_episode_seed(seed, 0))
        shown = {round(place * len(actions) / (_STRIP - 1)): place for place in range(_STRIP)}
        for step in range(len(actions) + 1):
            if step in shown:
                ax = row[shown[step]]
                ax.imshow(env.render())
                away = f"{env.distance:.2f} away"
                ax.set_title(f"step {step}\n{away}" if name == "frozen" else away, fontsize="small")
            if step < len(actions):
                env.step(actions[step])
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(name)


def _strip_of(results: Results) -> str:
    return "color-hard" if "color-hard" in results.settings else results.settings[0]


def _describe_strip(results: Results) -> str:
    setting = _strip_of(results)
    return (
        f"Frames of the first episode with {setting}, above with the frozen policy, below with the one that adapts. Over all episodes the "
        f"frozen policy earns {results.mean('default', 'frozen', setting):.3f} a step, the adapting one "
        f"{results.mean('default', 'reward', setting):.3f}."
    )


def _draw_gains(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    arms = [arm for arm in results.arms if arm not in _STILL]
    for place, arm in enumerate(arms):
        settings = [setting for setting in results.settings if results.has(arm, setting)]
        heights = [results.settings.index(setting) + 0.12 * (place - (len(arms) - 1) / 2) for setting in settings]
        values = [results.values(arm, "gain", setting) for setting in settings]
        axes.plot([sum(v) / len(v) for v in values], heights, "o", label=arm)
        for height, each in zip(heights, values, strict=True):
            axes.plot(each, [height] * len(each), "|", color="grey")
    axes.axvline(0.0, color="grey", linestyle="--")
    axes.set_yticks(range(len(results.settings)), results.settings)
    axes.invert_yaxis()
    axes.set_xlabel("gain of adapting over the frozen policy, reward a step")
    figure.legend(loc="outside lower center", ncols=5)


def _describe_gains(results: Results) -> str:
    parts = [
        f"{arm}, {setting}: {results.mean(arm, 'gain', setting):+.3f}"
        for setting in results.settings
        for arm in results.arms
        if arm not in _STILL and results.has(arm, setting)
    ]
    return "Gain of adapting over the frozen policy on the same episodes, in reward a step. " + "; ".join(parts) + "."


def _gain(arm: str, setting: str) -> Callable[[Results, int], float]:
    """What adapting gains on the same episodes."""
    return lambda results, seed: results.value(arm, "gain", seed, setting)


def _cost(arm: str) -> Callable[[Results, int], float]:
    """What adapting loses where nothing has changed."""
    return lambda results, seed: -results.value(arm, "gain", seed, "train")


_SETTINGS = {
    "train": Setting("train", "as in training", {"shift": "train"}),
    "color-easy": Setting("color-easy", "colours moved by up to 0.15", {"shift": "color_easy"}),
    "color-hard": Setting("color-hard", "colours moved by up to 0.35", {"shift": "color_hard"}),
    "distract": Setting("distract", "three moving discs", {"shift": "distract"}),
    "texture": Setting("texture", "a sine pattern behind", {"shift": "texture"}),
}
_EVERYWHERE = ("paper", "default")
_WHERE_IT_MATTERS = ("frozen", *_EVERYWHERE, "buffer", "gate", "encoder", "alone", "jitter", "convolution")


def _with(name: str, arms: tuple[str, ...]) -> Setting:
    setting = _SETTINGS[name]
    return Setting(setting.name, setting.title, setting.changes, arms)


_METRICS = (
    Metric("reward", "Reward a step", "", "higher", 3),
    Metric("frozen", "Frozen policy", "", "higher", 3),
    Metric("gain", "Gain over it", "", "higher", 3),
    Metric("error", "Standard error over episodes", "", None, 3),
    Metric("worst", "Gain, worst third of looks", "", "higher", 3),
    Metric("middle", "Middle third", "", "higher", 3),
    Metric("best", "Best third", "", "higher", 3),
    Metric("updates", "Steps with an update", "%", None, 0),
    Metric("loss_begin", "Auxiliary loss, first tenth", "", "lower", 3),
    Metric("loss_end", "Last tenth", "", "lower", 3),
    Metric("departure", "Departure of the action", "", None, 3),
)

_DEPLOYMENT = Part(
    name="deployment",
    question="Does a policy that goes on learning after deployment earn more, and what does it cost?",
    settings_type=Deployment,
    cell=cell,
    arms=(
        Arm("frozen", "frozen policy", "baseline", {"method": "frozen"}),
        Arm("paper", "PAD, the authors' rate 1e-3", "method", {"method": "paper"}),
        Arm("default", "PAD, rate 1e-4", "method"),
        Arm("buffer", "PAD, 3e-4, buffer of 64", "ablation", {"method": "buffer"}),
        Arm("gate", "PAD, 3e-4, buffer, calibrated gate", "ablation", {"method": "gate"}),
        Arm("encoder", "PAD, 1e-4, head fixed", "ablation", {"method": "encoder"}),
        Arm("alone", "frozen, trained without the task", "baseline", {"method": "frozen", "training": "alone"}),
        Arm("jitter", "frozen, trained with colour jitter", "baseline", {"method": "frozen", "training": "jitter"}),
        Arm("convolution", "frozen, trained with random convolutions", "baseline", {"method": "frozen", "training": "convolution"}),
    ),
    metrics=_METRICS,
    claims=(
        Claim(
            "cheap",
            "Where nothing has changed, adapting at a rate of 1e-4 costs at most 0.02 of reward a step",
            _cost("default"),
            0.02,
            "at most",
            digits=3,
        ),
        Claim(
            "harm",
            "Where nothing has changed, adapting at the authors' rate of 1e-3 costs at least 0.01 of reward a step",
            _cost("paper"),
            0.01,
            digits=3,
        ),
    ),
    figures=(
        Figure("strip", "An episode in other colours: frozen and adapting", _describe_strip, _draw_strip),
        Figure("gains", "What adapting gains and loses", _describe_gains, _draw_gains),
    ),
    scales={
        "quick": Scale(
            arms=("paper", "default"),
            settings=(_with("color-hard", ("paper", "default")), _with("train", ("paper", "default"))),
            changes={"learner": "imitation", "share": "features", "train_steps": 1000, "episodes": 8, "steps": 50},
            dropped="training by reinforcement (an expert is imitated, projected features are shared), 92 of 100 episodes and half of "
            "each, other looks and settings",
            minutes=1,
        ),
        "standard": Scale(
            arms=_WHERE_IT_MATTERS,
            settings=(
                _with("color-hard", _WHERE_IT_MATTERS),
                _with("train", ("paper", "default", "buffer", "gate")),
                _with("color-easy", _EVERYWHERE),
                _with("distract", _EVERYWHERE),
                _with("texture", _EVERYWHERE),
            ),
            minutes=170,
        ),
    },
    deviations=(
        "The paper's DeepMind Control tasks at 100 pixels with 500,000 steps need a GPU; a scene of 28 pixels and 5,000 steps stand in.",
        "Rates and buffer were chosen on other seeds.",
        "Thirds are by the frozen policy's reward in the same look from another start.",
    ),
)

_ALONE = ("default", "buffer", "whole", "ungated", "first")

_REPAIR = Part(
    name="repair",
    question="Does it help to adapt the first layer alone, and only where the loss says that something has changed?",
    settings_type=Deployment,
    cell=cell,
    arms=(
        Arm("default", "PAD, whole encoder, 1e-4", "baseline"),
        Arm("buffer", "PAD, whole encoder, 3e-4, buffer of 64", "ablation", {"method": "buffer"}),
        Arm("whole", "PAD, whole encoder, 1e-3, buffer, gate, head fixed", "ablation", {"method": "whole"}),
        Arm("ungated", "PAD, first layer, 1e-3, buffer, head fixed", "ablation", {"method": "ungated"}),
        Arm("first", "PAD, first layer, 1e-3, buffer, gate, head fixed", "method", {"method": "first"}),
    ),
    metrics=_METRICS,
    claims=(
        Claim(
            "repairs",
            "Under strong changes of colour, adapting the first layer alone behind a calibrated gate gains at least 0.02 of reward a step",
            _gain("first", "color-hard"),
            0.02,
            digits=3,
            scales=("standard",),
        ),
        Claim(
            "shut",
            "Where nothing has changed, adapting the first layer alone behind a calibrated gate costs at most 0.02 of reward a step",
            _cost("first"),
            0.02,
            "at most",
            digits=3,
            scales=("standard",),
        ),
    ),
    figures=(Figure("gains", "What adapting the first layer alone gains and loses", _describe_gains, _draw_gains),),
    scales={
        "quick": Scale(
            arms=("first",),
            settings=(_with("color-hard", ("first",)), _with("train", ("first",))),
            changes={"learner": "imitation", "share": "features", "train_steps": 1000, "episodes": 16},
            dropped="training by reinforcement (an expert is imitated), 84 of 100 episodes, other looks and settings",
            minutes=1,
        ),
        "standard": Scale(
            arms=_ALONE,
            settings=(
                _with("color-hard", _ALONE),
                _with("train", _ALONE),
                _with("color-easy", ("first",)),
                _with("texture", ("first",)),
            ),
            changes={"share": "features"},
            minutes=80,
        ),
    },
    deviations=(
        "Policy, critic and task share the projected features too, not the convolutions alone.",
        "Which layers adapt, the rate and the gate were chosen on color-hard and train with other episodes of the single seed 101.",
    ),
)

STUDY = Study(
    name="pad",
    title="Policy adaptation during deployment",
    question="Does a policy that goes on learning after deployment earn more, and what does it cost where nothing has changed?",
    paper="Hansen, Jangir, Sun, Alenyà, Abbeel, Efros, Pinto, Wang: Self-Supervised Policy Adaptation during Deployment. ICLR 2021",
    follows="Its protocol of paired episodes under changed colours and backgrounds",
    theme="after deployment",
    parts=(_DEPLOYMENT, _REPAIR),
    origin="outlast.studies.pad:STUDY",
)
