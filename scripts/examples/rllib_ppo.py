"""PPO by RLlib's new API stack: its own module with masks, over compiled rows."""

from time import process_time

from common import ROLLOUT, TASK, decisions, report
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule
from ray.tune.registry import register_env

from servegym.envs import MaskInObservation, ServingEnv, ServingVectorEnv, VectorMaskInObservation


def make(context: dict) -> MaskInObservation | VectorMaskInObservation:
    """Return one environment, for its spaces, or as many rows as RLlib wants; it resets by next-step."""
    if "num_envs" not in context:
        return MaskInObservation(ServingEnv(TASK), "observations")
    rows = ServingVectorEnv(context["num_envs"], TASK, autoreset_mode="NextStep")
    return VectorMaskInObservation(rows, "observations")


ROWS = 64  # a step of 64 rows costs RLlib little more than a step of ten
register_env("serving", make)
total = decisions(300_000)
net = DefaultModelConfig(fcnet_hiddens=[128, 128], fcnet_activation="tanh", vf_share_layers=False)
spec = RLModuleSpec(module_class=ActionMaskingTorchRLModule, model_config=net)
config = (
    PPOConfig()
    .environment("serving")
    .env_runners(
        num_env_runners=0, num_envs_per_env_runner=ROWS, gym_env_vectorize_mode="vector_entry_point"
    )
    .training(
        lr=[[0, 1e-3], [total, 1e-4]],
        train_batch_size=ROLLOUT,
        minibatch_size=ROLLOUT // 4,
        num_epochs=4,
        gamma=1.0,
        lambda_=0.998,
        clip_param=0.2,
        entropy_coeff=[[0, 3e-3], [total, 0.0]],
        grad_clip=0.5,
        use_kl_loss=False,
        vf_loss_coeff=0.5,
        vf_clip_param=float("inf"),
    )
    .rl_module(rl_module_spec=spec)
    .debugging(seed=0, log_level="ERROR")
)
algorithm = config.build_algo()
began = process_time()
for _ in range(total // ROLLOUT):
    algorithm.train()
seconds, module = process_time() - began, algorithm.get_module()
report(lambda o: module.pi(module.encoder({"obs": o})["encoder_out"]["actor"]), total, seconds)
algorithm.stop()
