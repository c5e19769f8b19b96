"""A Stable-Baselines3 policy that goes on learning after deployment (extra rl and stable-baselines3)."""

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from outlast.adapt import AdaptedEnv, InverseDynamics, PolicyAdapter, from_sb3, joint_step
from outlast.rl import PixelReach

torch.manual_seed(0)
env = PixelReach(size=36)
model = SAC("CnnPolicy", env, buffer_size=2000, learning_starts=50, batch_size=16, seed=0, device="cpu")
encoder, _ = from_sb3(model)
aux = InverseDynamics(512, 2, hidden=64)
optimizer = torch.optim.Adam([*encoder.parameters(), *aux.parameters()], lr=1e-3)


class TrainTheTask(BaseCallback):
    """The auxiliary task must be trained next to the policy: without that its head knows nothing after deployment."""

    def _on_step(self):
        if self.num_timesteps > 50:
            batch = self.model.replay_buffer.sample(16)
            frames = batch.observations.byte(), batch.actions, batch.next_observations.byte()
            self.loss = joint_step(encoder, aux, optimizer, *frames)
        return True


task = TrainTheTask()
model.learn(120, callback=task)
print(f"inverse dynamics after a short training {task.loss:.2f} (0.33 for a constant)")

adapter = PolicyAdapter(*from_sb3(model), aux, lr=1e-4, batch=8, buffer=32)
deployed = AdaptedEnv(PixelReach(size=36, shift="color_hard", seed=1), adapter)
obs, _ = deployed.reset()
over = False
while not over:
    obs, reward, terminated, truncated, _ = deployed.step(adapter.act(obs))
    over = terminated or truncated
print(adapter.report)
