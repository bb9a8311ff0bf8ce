"""The Markov decision process over the simulator: actions, observation, reward, metrics."""
