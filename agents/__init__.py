"""Trained agents: training, policies, export and loading.

The only room that may import torch and stable_baselines3. It builds on `servegym.envs` and never
imports `servegym.baselines`.
"""
